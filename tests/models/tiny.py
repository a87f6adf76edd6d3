"""Language models of transformers, shrunk: their own code at sizes that run in a second."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

VOCABULARY = 5003
TASKS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_DATA = tomllib.loads(Path(__file__).with_name("tiny.toml").read_text())


def classes() -> dict[str, list[str]]:
    """Every class of the three mappings, with the tasks that it is listed for."""
    tasks: dict[str, list[str]] = {}
    for task, mapping in TASKS.items():
        for name in mapping.values():
            listed = tasks.setdefault(name, [])
            if task not in listed:
                listed.append(task)
    return dict(sorted(tasks.items()))


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model of the class, in training mode, without dropout, the same each time.

    Whatever is as long as the vocabulary gets larger random values than a fresh model has: logits
    that are nearly zero hide a missing bias or a wrong softcap, and very large ones the softmax.
    """
    cls = getattr(transformers, name)
    config = shrink(cls.config_class, _DATA["overrides"].get(name, {}))
    torch.manual_seed(0)
    model = cls(config)
    vocabulary = getattr(model.config, "vocab_size", VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():
            if vocabulary in parameter.shape:
                parameter.normal_(std=0.1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for part in _with_parts(model.config):
        part.use_cache = False
    return model.train().to(dtype)


def shrink(
    cls: type[PreTrainedConfig],
    overrides: Mapping[str, Any],
    given: Mapping[str, Any] | None = None,
) -> PreTrainedConfig:
    """A small configuration of the class.

    Args:
        cls: the configuration's class.
        overrides: values for its fields; for a configuration within it, a table of such values.
        given: values that its parent gives to it where the class's own are not meant.
    """
    overrides = _DATA["overrides"].get(cls.model_type, {}) | dict(overrides)
    values = dict(given or {})
    try:
        default = cls(**values)
    except Exception:  # a few are not valid as they are
        default = None
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name, spec in cls.sub_configs_defaults.items():
        if name in overrides and not isinstance(overrides[name], Mapping):
            continue
        if spec.optional and getattr(default, name, None) is None:
            continue
        part = spec.config_class
        if not issubclass(part, PreTrainedConfig):
            part = spec.get_config_class(spec.model_type)
        values[name] = shrink(part, overrides.get(name, {}), spec.init_kwargs)
    for name, field in fields.items():
        if name in cls.sub_configs_defaults:
            continue
        current = values.get(name, field.default)
        if current is dataclasses.MISSING:
            current = field.default_factory() if callable(field.default_factory) else None
        small = _small(name, current)
        if small is not current:
            values[name] = small
    values.update(_layer_lists(default, fields))
    values.update((k, v) for k, v in overrides.items() if k not in cls.sub_configs_defaults)
    return cls(**values)


def _small(name: str, value: Any) -> Any:
    """The value of one field, made small; the same object if it may stay."""
    if value is not None and name in _DATA["values"]:
        return _DATA["values"][name]
    if isinstance(value, bool):
        return value
    if isinstance(value, float):
        return 0.0 if "drop" in name else value
    if isinstance(value, int):
        if name.endswith(("_id", "_index", "_idx")):
            return value if value < VOCABULARY else 100 + value % 4000
        size = _size(name)
        return value if size is None or value <= size else size
    if isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
        small = [_small(name, item) for item in value]
        return value if small == list(value) else type(value)(small)
    return value


@functools.cache
def _size(name: str) -> int | None:
    for size, patterns in _DATA["sizes"].items():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            return int(size)
    return None


def _layer_lists(default: PreTrainedConfig | None, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Lists that have an item for each layer, cut to one layer of each kind, and at least two."""
    if default is None:
        return {}
    name = next((name for name in _LAYERS if isinstance(getattr(default, name, None), int)), None)
    if name is None:
        return {}
    count = getattr(default, name)
    lists = {}
    for field in fields:
        try:
            value = getattr(default, field)
        except Exception:  # a field that differs between layers
            continue
        if isinstance(value, (list, tuple)) and len(value) == count > 2:
            lists[field] = value
    if not lists:
        return {}
    first = {
        str(kind): index
        for index, kind in reversed([*enumerate(zip(*lists.values(), strict=True))])
    }
    kept = sorted(first.values())[:4]
    kept += [kept[0]] * (2 - len(kept))
    attribute = default.attribute_map.get(name, name)
    small = {field: [_small(field, value[i]) for i in kept] for field, value in lists.items()}
    return {attribute: len(kept), **small}


def _with_parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for name in config.sub_configs_defaults:
        if isinstance(part := getattr(config, name, None), PreTrainedConfig):
            yield from _with_parts(part)


def inputs(model: PreTrainedModel, rows: int = 2, columns: int = 24) -> dict[str, Tensor]:
    """Random token ids and labels, some of them ignored, and what else the class needs."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    text = config.get_text_config()
    vocabulary = min(getattr(text, "vocab_size", VOCABULARY), VOCABULARY)

    def tokens(*shape: int) -> Tensor:
        return torch.randint(20, vocabulary - 30, shape, generator=generator)

    ids, labels = tokens(rows, columns), tokens(rows, columns)
    extra = {}
    match type(model).__name__:
        case "MusicgenForCausalLM" | "MusicgenMelodyForCausalLM":
            ids = tokens(rows * config.num_codebooks, columns)
            labels = tokens(rows, columns, config.num_codebooks)
        case "GitForCausalLM":
            size = config.vision_config.image_size
            extra["pixel_values"] = torch.randn(rows, 3, size, size, generator=generator)
        case "VoxtralRealtimeForConditionalGeneration":
            shape = rows, config.audio_config.num_mel_bins, columns * 2 * config.downsample_factor
            extra["input_features"] = torch.randn(shape, generator=generator)
    labels[0, :5] = -100
    return {"input_ids": ids, "labels": labels, **extra}
