"""
What attackers and accidents have tried, as lists, for the tests and for `attack_test.py`.

An attack is a command line of a script, which must refuse it in words: exit code 2, one sentence, no traceback, within
a minute of processor time and 2 GB. Add one to a list of a module here, or a list of your own to `GROUPS` in
`attack_test.py`.
"""

import importlib
import re
from dataclasses import dataclass
from pathlib import Path

from support.limits import Ending, call_limited


SECONDS, MAX_BYTES = 60, 2 * 2**30
REFUSED, HELD, FAILED = "refused in words", "held", "failed"


@dataclass(frozen=True)
class Attack:
    """
    A command line, and what must come of it.

    Args:
        name: of the attack.
        script: the module whose `main` gets the arguments.
        arguments: of the command line.
        words: a regular expression that the refusal contains.
        may_pass: whether exit code 0 is as good as a refusal: damage that changes nothing.
        never: a file that must not exist afterwards, as hostile code would have made it.
    """

    name: str
    script: str
    arguments: tuple
    words: str = ""
    may_pass: bool = False
    never: Path | None = None


def attempt(attack: Attack) -> tuple[str, str]:
    """`REFUSED`, `HELD` (rightly accepted) or `FAILED`, and what there is to say about it."""
    main = importlib.import_module(attack.script).main
    ending = call_limited(main, [str(argument) for argument in attack.arguments], SECONDS, MAX_BYTES)
    return judge(attack, ending)


def judge(attack: Attack, ending: Ending) -> tuple[str, str]:
    """As `attempt`, of what was tried."""
    lines = [line for line in ending.said.splitlines() if not line.startswith("All flags: ")]
    said = next((line for line in reversed(lines) if "error" in line), "")
    if attack.never is not None and attack.never.exists():
        return FAILED, "it ran code"
    if ending.code is None:
        return FAILED, f"it took more than {SECONDS} s"
    if ending.code == 0 and attack.may_pass:
        return HELD, ""
    if ending.code != 2 or "Traceback" in ending.said or not said:
        return FAILED, f"exit code {ending.code}: {' / '.join(lines[-3:])[-400:] or 'nothing was said'}"
    if not re.search(attack.words, said):
        return FAILED, f"other words than {attack.words!r}: {said[:400]}"
    if len(said) > 1000:
        return FAILED, f"a sentence of {len(said)} letters: {said[:200]}"
    return REFUSED, said
