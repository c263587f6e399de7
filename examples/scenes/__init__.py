"""Scenes to segment and to detect in: digits on photographs, with everything about them known exactly."""
