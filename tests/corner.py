"""Calibration of a corner of the demo: a few layers and experts of the same weights, in a second."""

import dataclasses
import functools
import json

import numpy as np

from exporter.model import tensor_specs
from exporter.pipeline.calibrate import StoreNumbers
from exporter.pipeline.store import Store
from exporter.quantize.sequential import Calibration
from exporter.types.recipe import GptqSpec, Recipe
from exporter.validate import text
from tests.conftest import DEMO

EVERYTHING = ["*.mlp.experts.*_proj.weight", "*.self_attn.*_proj.weight", "lm_head.weight"]
RECIPE = """
title = "t"
[[rule]]
match = {match}
method = "{method}"
scheme = "{scheme}"
[[rule]]
match = "*.mlp.experts.*_proj.weight"
method = "pass"
scheme = "mxfp4"
[[rule]]
match = "model.embed_tokens.weight"
method = "rtn"
scheme = "int8-g32"
[[rule]]
match = "*"
method = "keep"
"""
GATE0, DOWN0 = (f"model.layers.0.mlp.experts.{n}_proj.weight" for n in ("gate", "down"))
LEAVES = 33  # four of attention and three of each expert in two layers, and the head


@functools.cache
def tokens_of(part, windows=8, length=128):
    """Tokens int64 [windows, length] of the standard library, "calibration" or "held-out"."""
    return text.windows(DEMO / "tokenizer.json", text.standard_library(part), windows, length).tokens


class Job:
    """A calibration in a folder. Every run opens the store anew, as another process would."""

    def __init__(self, checkpoint, config, tokens, folder, match=EVERYTHING, method="gptq", scheme="int4-g32"):
        self.checkpoint, self.config, self.tokens, self.folder = checkpoint, config, tokens, folder
        recipe = Recipe.from_toml(RECIPE.format(match=json.dumps(match), method=method, scheme=scheme), "r", "r")
        self.steps = [recipe.step(s, checkpoint.scheme(s.name)) for s in tensor_specs(config)]

    def store(self):
        return Store(self.folder, self.steps, self.checkpoint.read, {})

    def run(self, numbers=StoreNumbers, spec=GptqSpec(), at_once=1):  # noqa: B008
        """The bytes of every calibrated leaf."""
        store = self.store()
        try:
            self.calibration = Calibration(
                self.config,
                numbers(store, self.checkpoint.read),
                self.tokens,
                spec,
                "cpu",
                self.folder / "calibration",
                experts_at_once=at_once,
            )
            self.calibration.run()
        finally:
            store.release()
        return self.leaves()

    def leaves(self):
        """Codes and scales of every calibrated leaf; what is known of them is in `facts`."""
        store = self.store()
        try:
            calibrated = [s for s in self.steps if s.method == "gptq"]
            self.facts = {(s.name, i): facts for s in calibrated for i, facts in enumerate(store.facts(s))}
            found = {key: store.intact(store.steps[key[0]], key[1]) for key in self.facts}
            return {key: (q.data.tobytes(), q.scales.tobytes()) for key, q in found.items()}
        finally:
            store.release()

    def committed(self):
        """How many leaves were ever committed."""
        journal = (self.folder / "journal.jsonl").read_text().splitlines()
        return sum('"tokens"' in line for line in journal)

    def lost(self):
        """Mean share of the energy that roundings lost, by kind of tensor."""
        kinds = {name.split(".")[-2] for name, _ in self.facts}
        each = {k: [f["error"] for (name, _), f in self.facts.items() if name.split(".")[-2] == k] for k in kinds}
        return {kind: float(np.mean(errors)) for kind, errors in each.items()}

    def numbers(self):
        return StoreNumbers(self.store(), self.checkpoint.read)


def corner(config, layers=2, experts=4):
    """The first layers and experts; every token goes to half of these."""
    return dataclasses.replace(
        config,
        num_hidden_layers=layers,
        layer_types=config.layer_types[:layers],
        num_local_experts=experts,
        num_experts_per_tok=experts // 2,
    )


def corner_job(checkpoint, folder):
    """The job that most tests do, whole or in pieces."""
    return Job(checkpoint, corner(checkpoint.config), tokens_of("calibration", 2, 96), folder)


class Killed(Exception):
    pass


def stopped_after(count):
    """Numbers that commit `count` leaves and die at the next."""

    class Stopped(StoreNumbers):
        left = count

        def put(self, *leaf):
            if Stopped.left == 0:
                raise Killed
            Stopped.left -= 1
            super().put(*leaf)

    return Stopped
