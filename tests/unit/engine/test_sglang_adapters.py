"""What kvmesh reads of SGLang's LoRA arguments, and how it has an adapter's blocks named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from fixtures.adapters import make_adapter
from kvmesh.common.config import load_config
from kvmesh.engine.model import resolve_model


@pytest.fixture
def loras(sg: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The resolved arguments, as SGLang keeps them in a scheduler."""
    settings = SimpleNamespace(enable_lora=True, lora_paths=[])
    monkeypatch.setattr(sg.adapters, "get_lora", lambda: settings)
    return settings


def ref(sg: SimpleNamespace, name: str, path: Path | str) -> object:
    lora_id = sg.lora_registry.LoRARef.deterministic_id(name, str(path))
    return sg.lora_registry.LoRARef(lora_id=lora_id, lora_name=name, lora_path=str(path), pinned=False)


def test_adapters_of_the_start_are_read(sg: SimpleNamespace, loras: SimpleNamespace) -> None:
    assert sg.adapters.loaded() == []
    loras.lora_paths = [ref(sg, "terse", "/a"), ref(sg, "rude", "/b")]
    assert [one.lora_name for one in sg.adapters.loaded()] == ["terse", "rude"]
    assert len({one.lora_id for one in sg.adapters.loaded()}) == 2
    loras.enable_lora = False
    assert sg.adapters.loaded() == []
    loras.enable_lora, loras.lora_paths = None, None
    assert sg.adapters.loaded() == []


def test_a_salt_takes_the_place_of_sglangs_own_mark(sg: SimpleNamespace) -> None:
    def request(lora_id: str | None, extra_key: str | None, cache_salt: str | None) -> SimpleNamespace:
        made = SimpleNamespace(lora_id=lora_id, extra_key=extra_key, cache_salt=cache_salt)
        sg.adapters.name_by_salt(None, made)
        return made

    assert request("id", "id", "adapter:terse").extra_key is None
    # Whatever else tells blocks apart stays.
    assert request("id", "id", None).extra_key == "id"
    assert request("id", "classid", "adapter:terse").extra_key == "classid"
    assert request(None, "class", "tenant:t").extra_key == "class"


def test_a_stores_namespace_has_the_weights_of_the_adapters(
    sg: SimpleNamespace, loras: SimpleNamespace, tmp_path: Path
) -> None:
    model = resolve_model(load_config()).path
    quiet = make_adapter(tmp_path / "quiet", model, layers=1, loudness=0.0)
    loud = make_adapter(tmp_path / "loud", model, layers=1, loudness=1.0)
    found = []
    for path in (None, quiet, loud, quiet):
        loras.lora_paths = [ref(sg, "terse", path)] if path else []
        found.append(sg.namespace._adapters())
    assert found[0] == {}
    assert found[1] == found[3] != found[2]
