"""The tile table: architecture x op x number of slots -> rows and columns of a tile, warps, splits. No autotuning: a
launch that is recorded in a graph must be the same on every machine of an architecture.

Chosen from what the compiler reports (tests/gpu/budgets.json: registers, spills, 128-bit loads, blocks a
multiprocessor), not from measurements: no GPU was at hand. plans.py turns a table line and a matrix into a launch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

ARCHS = (70, 75, 80, 86, 89, 90)  # V100, T4, A100, A40/3090, L40/4090, H100

# Multiprocessors of the GPU that stands for an architecture. They only decide into how many splits a small matrix is
# cut.
MULTIPROCESSORS = {70: 80, 75: 40, 80: 108, 86: 84, 89: 128, 90: 132}

# Bytes of shared memory that one block may take (CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability").
SHARED_LIMIT = {70: 98304, 75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448}

BATCHES = (1, 2, 4, 8, 16)  # a batch takes the line of the next larger number here


@dataclass(frozen=True)
class Tile:
    """Of a program: rows of W, warps, and how much of a row in one step: columns of a plain matrix, 32-bit words of a
    packed one; fewer than its threads, see matvec.py. blocks: programs that a multiprocessor should have to itself, at
    least."""

    rows: int
    warps: int = 4
    words: int = 64
    blocks: int = 4


@dataclass(frozen=True)
class AttentionTile:
    """positions of a step, warps, and stages of the pipeline that fetches K,V ahead (with tensor cores only)"""

    positions: int
    warps: int = 4
    stages: int = 2
    blocks: int = 2


WORD = {"int8": 4, "int4": 8}  # columns in a 32-bit word

MAX_HEAD_DIM = 512
SMALLEST_PRODUCT = 16  # rows and columns of a tensor core's

# The more slots, the more sums a thread holds (rows x words / threads of each), so the fewer rows and words. By number
# of slots, as BATCHES. norm_gate_up has two matrices in a program.
_PLAIN = (Tile(64), Tile(64), Tile(32), Tile(32), Tile(32))
_PACKED = (Tile(32), Tile(32), Tile(32), Tile(32, words=32), Tile(32, words=16))
_TWO_PACKED = (*(Tile(32, words=32),) * 4, Tile(32, words=16))
_TWO_PLAIN = (Tile(32), Tile(32), Tile(32), Tile(32), Tile(16))

_MATVEC = {
    "norm_qkv_rope": {"plain": _PLAIN, "packed": _PACKED},
    "kv_fill": {"plain": _PLAIN, "packed": _PACKED},
    "proj_add": {"plain": _PLAIN, "packed": _PACKED},
    "norm_gate_up": {"plain": _TWO_PLAIN, "packed": _TWO_PACKED},
    "norm_logits": {"plain": _PLAIN, "packed": _PACKED},
}
_MATVEC_BY_ARCH = dict.fromkeys(ARCHS, _MATVEC)  # the compiler gives no reason yet to tell them apart here

_TENSOR_CORES = AttentionTile(positions=64, stages=3)
_ATTENTION_BY_ARCH = {
    70: None,
    75: None,
    80: _TENSOR_CORES,
    86: AttentionTile(positions=32, stages=3),  # 100 KiB of shared memory
    89: AttentionTile(positions=32, stages=3),
    90: _TENSOR_CORES,
}


def power_of_2(n: int) -> int:
    """The least that is no less"""
    return 1 << (n - 1).bit_length()


def bucket(batch: int) -> int:
    """Index of the table line for this many slots."""
    return next(i for i, largest in enumerate(BATCHES) if batch <= largest)


def matvec_tile(arch: int, op: str, batch: int, packed: bool) -> Tile:
    return _MATVEC_BY_ARCH[arch][op]["packed" if packed else "plain"][bucket(batch)]


def columns(tile: Tile, width: str, inputs: int) -> int:
    """Columns of a step of a matrix with this many inputs: fewer where the last step would be mostly empty."""
    if width not in WORD:
        return tile.words
    words = tile.words
    while words > 16 and -(-inputs // (words * WORD[width])) * words * WORD[width] > 1.2 * inputs:
        words //= 2
    return words * WORD[width]


def splits(arch: int, tile: Tile, blocks: int, steps: int, most: int) -> int:
    """Into how many splits to cut a matrix of this many row blocks and column steps: enough to fill the chip, `most` at
    most."""
    wanted = -(-MULTIPROCESSORS[arch] * tile.blocks // blocks)
    return max(1, min(wanted, steps, most, 16))


def fewest_positions(group: int, head_dim: int, itemsize: int) -> int:
    """Positions that a program of attention must have at least, for `group` query heads a key-value head: so many that
    the float32 sums it leaves are 1/20 of its K,V, at most.

    This costs programs while the context is short: at 512 positions SmolLM2-135M has 24 (the tiles alone would allow 96
    on sm_70), and Llama-3.2-1B 48 on sm_70 (160) and 32 on sm_80 (64), fewer than there are multiprocessors. Whether
    finer programs, whose sums an L2 cache may well keep from memory, are quicker there, only a GPU can say."""
    sums = -(-group * (head_dim + 2) * 4 // 32) * 32  # memory moves sectors of 32 bytes
    return -(-20 * sums // (2 * head_dim * itemsize))


def attention_shared_bytes(tile: AttentionTile, group: int, head_dim: int) -> int:
    """Bytes of shared memory that Triton takes for a block with tensor cores: K,V of the stages that are on their way,
    and what the products are of. tests/gpu/test_compile_gate.py holds it against the compiler."""
    return 2 * (2 * (tile.stages - 1) * tile.positions * head_dim + group * (head_dim + tile.positions))


def attention_tile(arch: int, group: int, head_dim: int, sixteen_bit: bool) -> tuple[AttentionTile, bool]:
    """(tile, whether with tensor cores) for `group` query heads a key-value head. ValueError for heads that no tile
    suits."""
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"head_dim {head_dim}: the attention kernels hold a whole head, of {MAX_HEAD_DIM} values at most; use "
            "backend='cpu'."
        )
    tile = _ATTENTION_BY_ARCH[arch]
    if tile is None or not sixteen_bit:
        # Every thread holds its share of group x positions x head_dim products, and of keys and values.
        products = (4096 if sixteen_bit else 2048) // (power_of_2(group) * power_of_2(head_dim))
        return AttentionTile(positions=max(4, min(64, products)), stages=1), False
    rows, columns = (max(SMALLEST_PRODUCT, power_of_2(n)) for n in (group, head_dim))
    while (wanted := attention_shared_bytes(tile, rows, columns)) > SHARED_LIMIT[arch]:
        if tile.positions == SMALLEST_PRODUCT:
            raise ValueError(
                f"head_dim {head_dim} with {group} query heads a key-value head: the attention kernel takes {wanted} "
                f"bytes of shared memory, and a block of sm_{arch} has {SHARED_LIMIT[arch]}; choose "
                "kv_cache_dtype='float32', or backend='cpu'."
            )
        tile = replace(tile, positions=tile.positions // 2)
    return tile, True
