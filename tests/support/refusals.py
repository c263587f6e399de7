"""How scripts refuse what does not fit."""


def refusal(main, capsys, *arguments) -> str:
    """The sentence of a script that refuses its command line: no traceback, exit code 2."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as leaving:
        code = leaving.code
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and "Traceback" not in "".join(said)
    return next(line for line in reversed(said) if "error" in line)
