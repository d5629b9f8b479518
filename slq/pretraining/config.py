"""Settings of the job that trains the tiny backbone."""

from typing import Annotated

from pydantic import Field

from slq.config import Section

Positive = Annotated[int, Field(gt=0)]


class PretrainConfig(Section):
    """Everything that decides the tiny backbone's weights."""

    seed: int = 0
    """Seeds the scenes, the weights and nothing else; the order of examples is their index."""
    hidden: Positive = 192
    """Width of the language model, a multiple of 64; it is also the embedding dimension."""
    num_layers: Positive = 6
    """Layers of the language model."""
    vision_hidden: Positive = 128
    """Width of the vision tower, a multiple of 32."""
    vision_depth: Annotated[int, Field(ge=4)] = 4
    """Layers of the vision tower."""
    position_scale: Annotated[float, Field(gt=0)] = 4.0
    """Standard deviation of the vision tower's position table at the start."""
    vocab_size: Positive = 2048
    """Size of the byte-level BPE vocabulary."""
    tokenizer_examples: Positive = 8000
    """Examples whose text the tokenizer is trained on."""
    image_rows: Positive = 32
    """Pictures per step; each carries a caption, questions and match prompts."""
    text_rows: Positive = 12
    """Packed text rows per step."""
    text_turns_per_row: Positive = 5
    """Text turns packed into one row."""
    num_matches: Positive = 3
    """Match prompts per picture."""
    num_questions: Positive = 2
    """Questions per picture."""
    num_steps: Positive = 2600
    """Optimiser steps."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.35
    """Share of the steps, at the end, over which the learning rate falls linearly to zero."""
    lr_matrices: float = 4e-3
    """Muon's learning rate for weight matrices (update RMS matched to AdamW's)."""
    lr_others: float = 2e-3
    """AdamW's learning rate for embeddings, norms and biases."""
    skill_weights: dict[str, float] = Field(
        default_factory=lambda: {
            "caption": 1.0,
            "question": 0.4,
            "match": 1.0,
            "restate": 0.6,
            "clue": 0.2,
            "cover": 1.0,
        }
    )
    """Weight of each skill's mean token loss."""
    autocast: bool = True
    """Run matrix products in bfloat16; weights and optimiser stay in float32."""
    evaluate_every: Positive = 200
    """Steps between evaluations on held-out combinations, which also write a checkpoint."""
    evaluate_scenes: Positive = 192
    """Held-out scenes per evaluation."""
