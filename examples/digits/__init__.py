"""The parts of the digits demonstration: its data and its page."""
