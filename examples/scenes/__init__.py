"""Scenes for segmentation and detection: digits on photographs, with exact annotations."""
