# SPDX-License-Identifier: Apache-2.0
"""preprocess_evo2 from the command line."""

import subprocess
import sys

import pytest

from evo2_megatron.cli.preprocess import main


@pytest.fixture
def config(tmp_path):
    (tmp_path / "a.fa").write_text(">one\nACGT\n>two\nAC\n>three\nGGG\n")
    path = tmp_path / "config.yaml"
    path.write_text("".join(
        f"- {{datapaths: ['{tmp_path}/a.fa'], output_dir: '{tmp_path}/out', output_prefix: {name}, chunksize: 25}}\n"
        for name in "xy"
    ))  # fmt: skip
    return path


def test_one_line_per_dataset(config, capsys):
    main(["-c", str(config)])
    out, err = capsys.readouterr()

    lines = out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("x: 3 records, 9 bases -> documents: 1 train, 1 val, 1 test; 12 tokens in ")
    assert err.count("chunksize has no effect") == 2
    assert len(list((config.parent / "out").iterdir())) == 12


def test_an_error_is_one_line(config, capsys):
    main(["--config", str(config)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as raised:
        main(["--config", str(config)])

    assert raised.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("preprocess_evo2: error: ") and err.count("\n") == 1
    assert "exists; set overwrite to true" in err


def test_neither_torch_nor_numpy_is_loaded(config):
    code = f"""
import sys
from evo2_megatron.cli.preprocess import main
main(["-c", {str(config)!r}])
sys.exit(" ".join({{"torch", "numpy", "megatron", "pydantic"}} & sys.modules.keys()) or 0)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
