"""The model that a benchmark measures, its INT8 copy, and a text in its tokens, made once."""

import json
from collections.abc import Callable
from pathlib import Path

from r1ray.config.schema import CompressConfig
from r1ray.data.texts import read_english
from r1ray.models import load_model, save_model
from r1ray.models.base import import_base, resolve_source
from r1ray.models.checkpoint import copy_tokenizer
from r1ray.models.quantization import quantize_modules
from r1ray.models.tokenizer import Tokenizer

__all__ = ["BaseFiles"]

_NUM_IDS = 40_000


class BaseFiles:
    """Files in `work`, found there by the next start; one that was begun is made anew.

    Args:
        source: of the model, as in `base.source`.
    """

    def __init__(self, work: Path, source: str) -> None:
        self._work, self._source = work, source

    def base(self) -> Path:
        """The model directory."""
        return self._once("base", self._import)

    def int8(self) -> Path:
        """The same in INT8, as `compress` makes it by default."""
        return self._once("int8", self._quantize)

    def ids(self) -> Path:
        """A JSON list of token ids of real English."""
        path = (self._work / "ids.json").resolve()
        if not path.exists():
            ids = Tokenizer(self.base()).encode(read_english())
            path.write_text(json.dumps(ids[:_NUM_IDS]), encoding="utf-8")
        return path

    def _once(self, name: str, make: Callable[[Path], None]) -> Path:
        target = (self._work / name).resolve()
        if not target.exists():
            partial = target.with_name(f"{name}.partial")
            partial.mkdir(parents=True, exist_ok=True)
            make(partial)
            partial.rename(target)
        return target

    def _import(self, target: Path) -> None:
        import_base(resolve_source(self._source), target)

    def _quantize(self, target: Path) -> None:
        model = load_model(self.base())
        quantize_modules(model, CompressConfig().scheme)
        save_model(model, target)
        copy_tokenizer(self.base(), target)
