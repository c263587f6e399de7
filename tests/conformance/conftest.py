"""The conformance tests take half a minute and a download: they are collected where the command line names them."""

from pathlib import Path


HERE = Path(__file__).parent


def pytest_ignore_collect(config) -> bool | None:
    named = (Path(config.invocation_params.dir, argument.split("::")[0]) for argument in config.args)
    return None if any(path.resolve().is_relative_to(HERE) for path in named) else True


def pytest_configure(config):
    for kind in ("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test"):
        config.addinivalue_line("markers", f"{kind}: a marker of transformers' tests")
