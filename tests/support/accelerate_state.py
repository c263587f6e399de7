"""Accelerate's state, which is one per process."""

from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState


def forget_accelerator():
    """As in a new process: the next accelerator may have another precision."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()
