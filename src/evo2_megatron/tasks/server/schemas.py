# SPDX-License-Identifier: Apache-2.0
"""The bodies of requests and answers; the OpenAPI page is made from them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from evo2_megatron.config import WeightFormat
from evo2_megatron.data.vcf import MAX_POSITION

MAX_SEQUENCES = 128
"""Of one request to score or embed; and variants."""

MAX_LETTERS = 256
"""More than any tokenizer has."""

MAX_STOP_STRING = 1_000

_DNA = "GGGCGGCGACCTCGCGGGTTTTCGCTATTT"  # lambda phage, bases 1 to 30

Sequence = Annotated[str, Field(min_length=1, description="bases, and lineage tags between pipes", examples=[_DNA])]
Sequences = Annotated[list[Sequence], Field(min_length=1, max_length=MAX_SEQUENCES, examples=[[_DNA, "ACGT"]])]
Seed = Annotated[int, Field(ge=0, lt=2**53)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Request(BaseModel):
    """No field is converted, and none is ignored: a misspelt name is an error."""

    model_config = ConfigDict(strict=True, extra="forbid")


class GenerateRequest(Request):
    """A prompt, and how to go on with it."""

    prompt: Sequence
    keep_prompt_case: bool = Field(False, description="do not show it to the model in upper case, as in training")
    max_new_tokens: int = Field(100, ge=1, description="most bases to add")
    temperature: Finite = Field(1.0, ge=0, description="0 takes the most probable base")
    top_k: int = Field(0, ge=0, description="draw among so many most probable; 0: no limit")
    top_p: Finite = Field(0.0, ge=0, le=1, description="draw among the fewest with this mass, after top_k; 0: off")
    seed: Seed | None = Field(None, description="the same seed gives the same bases; null: a new one, which is told")
    alphabet: str = Field(
        "", max_length=MAX_LETTERS, description="draw only these letters; empty: every token", examples=["ACGT"]
    )
    stop_strings: list[Annotated[str, Field(max_length=MAX_STOP_STRING)]] = Field(
        [], max_length=16, description="end as soon as the new bases hold one of these"
    )
    include_stop_string: bool = Field(False, description="keep the text that ended the sequence")
    stop_at_eod: bool = Field(True, description="end where the model ends the document; false: it cannot")
    return_log_probs: bool = Field(False, description="also the log-probability of each new base, in nat")
    stream: bool = Field(False, description="server-sent events, one as soon as there are new bases")


class Usage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class GenerateResponse(BaseModel):
    """A finished continuation."""

    completion: str = Field(description="new bases, without the prompt")
    finish_reason: Literal["length", "stop"]
    stop_string: str | None = Field(None, description="the one that ended it")
    usage: Usage
    seed: int = Field(description="given again, it gives the same bases")
    log_probs: list[float] | None = Field(None, description="of each new base under the model itself, in nat")
    elapsed_ms: float = Field(description="with the time in the queue")


class ScoreRequest(Request):
    """Sequences whose likelihood is asked for."""

    sequences: Sequences
    prepend_bos: bool = Field(False, description="put the token between documents in front: the first base counts too")
    mask_phylogenetic_tags: bool = Field(False, description="do not score lineage tags")
    per_base: bool = Field(False, description="also each scored base's log-probability")


class Score(BaseModel):
    """Of one sequence, in nat."""

    log_likelihood: float = Field(description="sum over the scored bases")
    mean_log_likelihood: float = Field(description="the sum by their number; 0 where none is scored")
    num_scored: int
    log_probs: list[float] | None = Field(None, description="of each scored base, in their order")


class ScoreResponse(BaseModel):
    """In the order of the sequences."""

    scores: list[Score]
    elapsed_ms: float


Text = Annotated[str, Field(min_length=1, pattern="^[!-~]+$")]


class Variant(Request):
    """A line of a VCF file with one ALT."""

    chrom: Text | None = Field(None, description="contig of the server's genome; null: of the sequence given")
    position: int = Field(ge=1, le=MAX_POSITION, description="of the first base of ref, counted from 1")
    ref: Text = Field(description="bases that are there", examples=["C"])
    alt: Text = Field(description="bases instead", examples=["G"])


class VariantsRequest(Request):
    """Variants whose effect on the likelihood is asked for."""

    variants: list[Variant] = Field(
        min_length=1, max_length=MAX_SEQUENCES, examples=[[{"position": 11, "ref": "C", "alt": "G"}]]
    )
    sequence: Sequence | None = Field(
        None, description="what the variants are in; null: the genome of the server (--fasta), with chrom"
    )
    window_length: int | None = Field(
        None, ge=4, description="bases around each variant; null: 8192, or as many as the server takes"
    )
    both_strands: bool = Field(False, description="mean with the reverse complement")
    prepend_bos: bool = Field(False, description="put the token between documents in front of each window")


class Effect(BaseModel):
    """Of one variant, in nat; null where it was not scored."""

    status: str = Field(description="scored, or why not: see docs/variants.md")
    detail: str | None = Field(None, description="what else there is to say of it")
    delta: float | None = Field(
        None, description="alt_log_likelihood minus ref_log_likelihood, by num_scored; below 0: alt is less probable"
    )
    ref_log_likelihood: float | None = Field(None, description="of the window as it is; sum, of two strands the mean")
    alt_log_likelihood: float | None = Field(None, description="of the window with alt")
    num_scored: int | None = Field(None, description="tokens that are scored of each window")


class VariantsResponse(BaseModel):
    """In the order of the variants."""

    effects: list[Effect]
    window_length: int
    elapsed_ms: float


class EmbedRequest(Request):
    """Sequences whose hidden states are asked for."""

    sequences: Sequences
    layers: list[int] = Field(
        min_length=1,
        max_length=128,
        description="residual stream after these layers, counted from 0, or from -1 backwards",
        examples=[[-1]],
    )
    pooling: Literal["mean", "last"] | None = Field(
        "mean", description="one vector per sequence, the mean over its bases or that of the last; null: one per base"
    )
    prepend_bos: bool = False
    encoding: Literal["json", "npz"] = Field(
        "json", description="numbers in the answer, or a NumPy archive in Base64, a quarter of the size and exact"
    )


class EmbedResponse(BaseModel):
    """Embeddings, float32; the fields of the encoding that was not asked for are null."""

    layers: list[int] = Field(description="counted from 0, ascending, each once")
    embeddings: list[dict[str, list]] | None = Field(
        None, description="for each sequence and layer a vector, or one for each base"
    )
    data: str | None = Field(None, description="NPZ in Base64; arrays are called SEQUENCE.LAYER, counted from 0")
    elapsed_ms: float


class NimGenerateRequest(Request):
    """As NVIDIA's NIM for Evo 2 takes it; null stands for the default."""

    sequence: Sequence
    num_tokens: int | None = Field(100, ge=1, description="most bases to add")
    temperature: Finite | None = Field(0.7, ge=0, description="0 takes the most probable base")
    top_k: int | None = Field(3, ge=0, description="draw among so many most probable; 0: no limit")
    top_p: Finite | None = Field(0.0, ge=0, le=1, description="draw among the fewest with this mass; 0: off")
    random_seed: Seed | None = None
    enable_logits: bool | None = False
    enable_sampled_probs: bool | None = False
    enable_elapsed_ms_per_token: bool | None = False


class NimGenerateResponse(BaseModel):
    """As NVIDIA's NIM for Evo 2 answers."""

    sequence: str = Field(description="new bases, without those given")
    logits: list[list[float]] | None = Field(None, description="before each new base, over the vocabulary")
    sampled_probs: list[float] | None = Field(None, description="of each new base under the model itself")
    elapsed_ms: int
    elapsed_ms_per_token: list[int] | None = None


class NimForwardRequest(Request):
    """As NVIDIA's NIM for Evo 2 takes it."""

    sequence: Sequence
    output_layers: list[str] = Field(
        min_length=1,
        max_length=100,
        description="modules by Megatron's name, as in GET /v1/metadata, or by Arc's: blocks.N, blocks.N.mlp.l3, "
        "norm, unembed, embedding_layer",
        examples=[["decoder.layers.0", "output_layer"]],
    )


class NimForwardResponse(BaseModel):
    """As NVIDIA's NIM for Evo 2 answers."""

    data: str = Field(description="NPZ in Base64; array NAME.output is float32 [tokens, 1, channels]")
    elapsed_ms: int


class Health(BaseModel):
    """Whether the server works."""

    status: Literal["live", "ready"]


class Limits(BaseModel):
    """What the server accepts."""

    max_seq_length: int = Field(description="tokens of a sequence, prompt and completion together")
    max_batch_size: int = Field(description="sequences that are generated at a time")
    max_queue: int = Field(description="requests that wait")
    max_sequences: int = Field(description="sequences, or variants, of one request")
    max_window_bases: int = Field(description="bases of all windows of the variants of one request")
    max_body_bytes: int
    max_json_values: int = Field(description="numbers of an answer in JSON")
    max_npz_values: int = Field(description="numbers of an answer in an NPZ archive")


class Load(BaseModel):
    """What the server has to do at this moment."""

    waiting: int
    generating: int


class Metadata(BaseModel):
    """What is served."""

    version: str
    checkpoint: str
    num_layers: int
    hidden_size: int
    num_parameters: int
    pattern: str = Field(description="S, D, H: short, medium, long Hyena layers; *: attention")
    vocab_size: int
    precision: str
    quantize_weights: WeightFormat = Field(description="in what linear layers keep their weights")
    device: str
    fasta: str | None = Field(description="genome that /v1/variants knows")
    limits: Limits
    load: Load
    modules: list[str] = Field(description="names that output_layers knows")


class Problem(BaseModel):
    """Why there is no result."""

    detail: str
