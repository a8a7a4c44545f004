"""Where the reports on a stranger's file go, and which gates it is held to."""

from pathlib import Path

import pytest

from exporter.errors import Refused
from exporter.pipeline.foreign_kinds import Foreign
from exporter.pipeline.profiles import load_profile
from exporter.pipeline.verify import _limits, _require_own, _says_which


def test_what_a_killed_run_left_is_no_reason_to_refuse(tmp_path: Path) -> None:
    folder = tmp_path / "said"
    assert _require_own(folder) == folder
    assert not folder.exists()  # a model that cannot be opened leaves nothing behind
    folder.mkdir()
    for name in ("report.json", "report.html.partial", ".lock"):
        (folder / name).touch()
    (folder / ".proof-ab12").mkdir()
    assert _require_own(folder) == folder


@pytest.mark.parametrize("name", ["manifest.json", "model.gguf", "README.md"])
def test_a_folder_with_files_of_someone_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "report.json").touch()
    (tmp_path / name).touch()
    with pytest.raises(Refused, match="holds other files than reports"):
        _require_own(tmp_path)


def test_a_graph_that_says_nothing_has_no_gate_on_what_it_says() -> None:
    profile = load_profile("16gb")
    bare = Foreign("onnx", Path("model.onnx"), (), "onnx")
    assert not _says_which(bare)
    assert "config_equal" not in _limits(profile, "lossy", bare, {})
    said = Foreign("onnx", Path("model.onnx"), (), "onnx", said={"vocab_size": 2048})
    assert _says_which(said)
    assert _limits(profile, "lossy", said, {"config_equal": False})["config_equal"] is True
