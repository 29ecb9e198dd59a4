"""Where the parts of a decoder sit, found from its module tree and one small table of names.

Roles are what methods speak of ("the output projection of the MLP of block 5"); no other package
names a module path. A role that a model lacks is recorded with the reason, so that a method that
needs it can be refused in one line.

The table is by child name, not by model: the names that decoders of the transformers library give
to the same part. D is the hidden size, I the inner size of an MLP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from knowpatch.deltas import Address, LowRank
from knowpatch.errors import ModelError

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")
ATTENTION_Q, ATTENTION_K, ATTENTION_V = ("q_proj",), ("k_proj",), ("v_proj",)
ATTENTION_IN = {"attn.q": ATTENTION_Q, "attn.k": ATTENTION_K, "attn.v": ATTENTION_V}
ATTENTION_FUSED = {"c_attn": "c_proj", "qkv_proj": "o_proj"}
"""Maps that compute queries, keys and values one behind the other, and the output map beside each:
one of the same name beside another output map (CodeGen's) orders them in a way of its own."""
ATTENTION_MIXED = ("query_key_value", "qkv_proj", "c_attn", "Wqkv", "qkv")
ATTENTION_OUT = ("o_proj", "out_proj", "c_proj", "dense", "wo")
MLP_OUT = ("down_proj", "c_proj", "fc_out", "dense_4h_to_h", "fc2", "w2")
MLP_UP = ("up_proj", "c_fc", "fc_in", "dense_h_to_4h", "fc1", "w3")
MLP_GATE = ("gate_proj", "w1")
MLP_GATE_UP = ("gate_up_proj",)
EXPERTS = ("experts",)

ROLES = ("mlp.out", "mlp.up", "mlp.gate", "attn.out", "attn.q", "attn.k", "attn.v")
"""The linear maps of a block that a method may ask for."""
WHOLE = "whole_mlp"
"""A block's whole MLP as one module, which a method may ask for as well."""


@dataclass(frozen=True)
class LinearRole:
    """One linear map of a block.

    Attributes:
        module: path of the module that computes it.
        address: its weight: a parameter, or a slice of a fused one.
        stored_in_out: True where the weight is stored (in, out), as in Conv1D, not (out, in).
    """

    module: str
    address: Address
    stored_in_out: bool

    def oriented(self, stored: Tensor) -> Tensor:
        """A stored weight, or a change of one, as (out, in); and back again."""
        return stored.T if self.stored_in_out else stored

    def factored(self, left: Tensor, right: Tensor) -> LowRank:
        """A change left (out, K) @ right (K, in), float32, as it is stored."""
        if self.stored_in_out:
            left, right = right.T, left.T
        return LowRank(left.float().contiguous(), right.float().contiguous())


@dataclass(frozen=True)
class Block:
    """One decoder block: its path, the linear maps that it has, and why it lacks the others.

    Attributes:
        whole_mlp: path of its MLP as one module; None where the maps sit in the block itself.
    """

    module: str
    linears: Mapping[str, LinearRole]
    missing: Mapping[str, str] = field(default_factory=dict)
    whole_mlp: str | None = None


@dataclass(frozen=True)
class Roles:
    """What sits where in one model.

    Attributes:
        stack: path of the list of decoder blocks.
        blocks: the blocks, from input to output.
        head: path of the module that maps hidden states to the vocabulary.
        embedding: path of the token embedding.
        hidden_size: D.
    """

    stack: str
    blocks: tuple[Block, ...]
    head: str
    embedding: str
    hidden_size: int
    architecture: str

    def linear(self, role: str, layer: int) -> LinearRole:
        """The linear map `role` of block `layer`; ModelError with the reason if it has none."""
        if not 0 <= layer < len(self.blocks):
            raise ModelError(
                f"layer {layer} does not exist: {self.architecture} has layers "
                f"0 to {len(self.blocks) - 1}"
            )
        block = self.blocks[layer]
        if role not in block.linears:
            reason = block.missing.get(role, f"roles are {', '.join(ROLES)}")
            raise ModelError(f"no {role!r} in block {layer} of {self.architecture}: {reason}")
        return block.linears[role]

    def whole_mlp(self, layer: int) -> str:
        """Path of the whole MLP of block `layer`; ModelError if it is not one module."""
        path = self.blocks[layer].whole_mlp
        if path is None:
            raise ModelError(f"no MLP of its own in block {layer} of {self.architecture}")
        return path

    def block_of(self, module: str) -> int:
        """The number of the block that holds the module at path `module`."""
        return next(i for i, b in enumerate(self.blocks) if f"{module}.".startswith(f"{b.module}."))

    def lacks(self, role: str) -> str | None:
        """Why no block has `role`, or None if some block has it."""
        if any(
            role in block.linears or (role == WHOLE and block.whole_mlp) for block in self.blocks
        ):
            return None
        return self.blocks[0].missing.get(role, "not known")


def at_depth(share: float, layers: int, chosen: int | None = None) -> int:
    """The block at a share of the depth: how a published layer carries over to another model.

    A `chosen` block goes before it.
    """
    return min(layers - 1, round(share * layers)) if chosen is None else chosen


def find_roles(model: nn.Module) -> Roles:
    """Find the roles of a causal language model.

    Raises:
        ModelError: no stack of decoder blocks, no embedding or no head; the message says which.
    """
    architecture = type(model).__name__
    paths = {id(module): path for path, module in model.named_modules()}
    head = _call(model, "get_output_embeddings")
    embedding = _call(model, "get_input_embeddings")
    if head is None or embedding is None:
        absent = "output head" if head is None else "token embedding"
        raise ModelError(f"{architecture} has no {absent}: it is not a causal language model")
    stack_path, stack = _find_stack(model, architecture)
    blocks = tuple(_find_block(f"{stack_path}.{i}", block) for i, block in enumerate(stack))
    weight = getattr(embedding, "weight", None)
    if weight is None:
        raise ModelError(f"{architecture}: its token embedding has no weight")
    hidden = _hidden_size(model, int(weight.shape[1]))
    return Roles(stack_path, blocks, paths[id(head)], paths[id(embedding)], hidden, architecture)


def _call(model: nn.Module, name: str) -> nn.Module | None:
    getter = getattr(model, name, None)
    found = getter() if callable(getter) else None
    return found if isinstance(found, nn.Module) else None


def _hidden_size(model: nn.Module, default: int) -> int:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    size = getattr(config, "hidden_size", None)
    return size if isinstance(size, int) else default


def _find_stack(model: nn.Module, architecture: str) -> tuple[str, nn.ModuleList]:
    """The decoder's blocks: the longest list of modules that have attention, in the text tower.

    A vision model holds a second stack for images; `get_decoder` leads to the one for text.
    """
    tower = _call(model, "get_decoder") or model
    prefix = next((path for path, module in model.named_modules() if module is tower), "")
    stacks = [
        (path, module)
        for path, module in tower.named_modules()
        if isinstance(module, nn.ModuleList) and any(_child(b, ATTENTION) for b in module)
    ]
    if not stacks:
        seen = sorted({name for name, _ in model.named_children()})
        raise ModelError(
            f"no stack of decoder blocks found in {architecture} (its parts: {', '.join(seen)}); "
            f"a block has a child called one of: {', '.join(ATTENTION)}"
        )
    path, stack = max(stacks, key=lambda item: len(item[1]))
    return ".".join(filter(None, [prefix, path])), stack


def _child(module: nn.Module, names: Sequence[str]) -> tuple[str, nn.Module] | None:
    children = dict(module.named_children())
    return next(((name, children[name]) for name in names if name in children), None)


def _find_block(path: str, block: nn.Module) -> Block:
    linears: dict[str, LinearRole] = {}
    missing: dict[str, str] = {}
    attention = _child(block, ATTENTION)
    if attention is None:
        missing |= dict.fromkeys(("attn.out", *ATTENTION_IN), "this block has no attention")
    else:
        _place_attention(linears, missing, f"{path}.{attention[0]}", attention[1])
    # OPT keeps its two MLP maps in the block itself.
    mlp_name, mlp = _child(block, MLP) or ("", block)
    mlp_path = f"{path}.{mlp_name}" if mlp_name else path
    experts = _child(mlp, EXPERTS)
    if experts is not None:
        count = _count_experts(experts[1])
        for role in ("mlp.out", "mlp.up", "mlp.gate", WHOLE):
            missing[role] = f"its MLP is a mixture of {count} experts"
        return Block(path, linears, missing)
    _place(linears, missing, "mlp.out", mlp_path, mlp, MLP_OUT)
    if fused := _child(mlp, MLP_GATE_UP):
        _split(linears, f"{mlp_path}.{fused[0]}", fused[1])
    else:
        _place(linears, missing, "mlp.up", mlp_path, mlp, MLP_UP)
        _place(linears, missing, "mlp.gate", mlp_path, mlp, MLP_GATE)
    if not mlp_name:
        missing[WHOLE] = "its MLP is not one module"
    return Block(path, linears, missing, mlp_path if mlp_name else None)


def _count_experts(experts: nn.Module) -> str:
    count = getattr(experts, "num_experts", None)
    if isinstance(experts, nn.ModuleList):
        count = len(experts)
    return str(count) if count else "several"


def _place(
    linears: dict[str, LinearRole],
    missing: dict[str, str],
    role: str,
    path: str,
    parent: nn.Module,
    names: Sequence[str],
) -> None:
    """Enter `role` if a child of `parent` has one of `names` and is a linear map."""
    found = _child(parent, names)
    if found is None:
        missing[role] = f"{path} has no child called one of: {', '.join(names)}"
    elif not isinstance(found[1], nn.Linear | Conv1D):
        missing[role] = f"{path}.{found[0]} is a {type(found[1]).__name__}, not a linear map"
    else:
        module = f"{path}.{found[0]}"
        linears[role] = LinearRole(
            module, Address(parameter=f"{module}.weight"), isinstance(found[1], Conv1D)
        )


def _split(linears: dict[str, LinearRole], path: str, fused: nn.Module) -> None:
    """A projection that computes gate and up at once: the gate is its first half."""
    if isinstance(fused, nn.Linear):
        inner = fused.out_features // 2
        linears |= _slices(path, {"mlp.gate": inner, "mlp.up": inner}, stored_in_out=False)


def _slices(path: str, sizes: Mapping[str, int], *, stored_in_out: bool) -> dict[str, LinearRole]:
    """The roles of a fused map, whose outputs come one behind the other."""
    found, start = {}, 0
    for role, size in sizes.items():
        address = Address(
            parameter=f"{path}.weight", dim=int(stored_in_out), start=start, stop=start + size
        )
        found[role], start = LinearRole(path, address, stored_in_out), start + size
    return found


def _place_attention(
    linears: dict[str, LinearRole], missing: dict[str, str], path: str, attention: nn.Module
) -> None:
    """The maps of an attention: its output, and what makes queries, keys and values."""
    _place(linears, missing, "attn.out", path, attention, ATTENTION_OUT)
    mixed = _child(attention, ATTENTION_MIXED)
    if mixed is None:
        for role, names in ATTENTION_IN.items():
            _place(linears, missing, role, path, attention, names)
    elif sizes := _fused_sizes(attention, *mixed):
        stored_in_out = isinstance(mixed[1], Conv1D)
        linears |= _slices(f"{path}.{mixed[0]}", sizes, stored_in_out=stored_in_out)
    else:
        reason = f"{path}.{mixed[0]} does not hold queries, keys and values one behind the other"
        missing |= dict.fromkeys(ATTENTION_IN, reason)


def _fused_sizes(attention: nn.Module, name: str, fused: nn.Module) -> dict[str, int]:
    """How many outputs of a fused map are queries, keys and values; nothing if they are mixed.

    An output map reads as many numbers as there are queries.
    """
    out = dict(attention.named_children()).get(ATTENTION_FUSED.get(name, ""))
    if isinstance(fused, Conv1D) and isinstance(out, Conv1D):
        whole, queries = int(fused.nf), int(out.nx)
    elif isinstance(fused, nn.Linear) and isinstance(out, nn.Linear) and name == "qkv_proj":
        whole, queries = fused.out_features, out.in_features
    else:
        return {}
    rest = (whole - queries) // 2
    return {"attn.q": queries, "attn.k": rest, "attn.v": rest}


def linear_of(model: nn.Module, parameter: str) -> LinearRole | None:
    """The linear map whose whole weight `parameter` is; None where it is something else."""
    path, _, name = parameter.rpartition(".")
    module = model.get_submodule(path)
    if name != "weight" or not isinstance(module, nn.Linear | Conv1D):
        return None
    return LinearRole(path, Address(parameter=parameter), isinstance(module, Conv1D))
