"""The C library and its loader."""

from __future__ import annotations

import pytest

from arb_hf import native
from helpers.process import ROOT, fresh_process


def test_every_source_is_built() -> None:
    tomllib = pytest.importorskip("tomllib")
    (extension,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    assert sorted(extension["sources"]) == sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("arb_hf/csrc/*.c"))
    assert sorted(extension["depends"]) == sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("arb_hf/csrc/*.h"))
    assert extension["optional"]


@pytest.mark.skipif(native.library() is None, reason="the C library is not built")
class TestLibrary:
    def test_isa_is_one_the_processor_has(self) -> None:
        assert 0 <= native.isa() <= native.require().arb_cpu_isa() < len(native.ISAS)

    def test_isa_can_be_forced(self) -> None:
        done = fresh_process("from arb_hf import native; print(native.ISAS[native.isa()])", ARB_HF_CPU_ISA="plain")
        assert done.stdout.strip() == "plain"

    def test_unknown_isa_is_an_error(self) -> None:
        done = fresh_process("from arb_hf import native; native.isa()", ARB_HF_CPU_ISA="mmx")
        assert done.returncode != 0
        assert "ARB_HF_CPU_ISA=mmx is unknown; it can be plain, avx2, avx512" in done.stderr


def test_a_missing_library_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(RuntimeError, match="pip install"):
        native.require()
