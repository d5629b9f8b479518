"""Byte-level tokenizers with the control tokens and chat templates of the families."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
QWEN_TOKENS = (
    PAD, TURN_START, TURN_END, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
INTERN_TOKENS = (PAD, TURN_START, TURN_END, "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
LLAVA_TOKENS = (*QWEN_TOKENS, "<image>", "<video>")
SMOL_TOKENS = (
    *QWEN_TOKENS, "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>",
)  # fmt: skip

_WORDS = (
    "True true False false Yes yes No no A B the caption match image Does Answer True or False. "
    "Caption: a small red dog stands left of two blue cats on a white background. "
    "fully or only partly user assistant True False Yes No A B\n"
)
_TEMPLATE = (
    "{{% for message in messages %}}<|im_start|>{{{{ message['role'] }}}}\n"
    "{{% for part in message['content'] %}}{{% if part['type'] == 'image' %}}{image}"
    "{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}<|im_end|>\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)
QWEN_TEMPLATE = _TEMPLATE.format(image="<|vision_start|><|image_pad|><|vision_end|>")
INTERN_TEMPLATE = _TEMPLATE.format(image="<IMG_CONTEXT>\n")
LLAVA_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + part['text'] }}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOL_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}:{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""The last two are worded as the published models word them; the others leave their system prompts out."""


def byte_level_core(special_tokens: tuple[str, ...]) -> Tokenizer:
    """A byte-level BPE in which every framing's label words are single tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([_WORDS, _WORDS.replace(" ", "\n")] * 20, trainer)
    return core


def tokenizer(
    tokens: tuple[str, ...], template: str, *, turn_end: str = TURN_END
) -> PreTrainedTokenizerFast:
    """A tokenizer with a family's control tokens and chat template.

    Args:
        tokens: Control tokens, the padding first.
        template: In Jinja.
        turn_end: The token that ends a turn.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_core(tokens),
        pad_token=PAD,
        eos_token=turn_end,
        extra_special_tokens=list(tokens[1:]),
        chat_template=template,
    )


def intern_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with the named tokens that InternVL's processor asks for."""
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_core(INTERN_TOKENS),
        pad_token=PAD,
        eos_token=TURN_END,
        extra_special_tokens=[TURN_START],
        model_specific_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        chat_template=INTERN_TEMPLATE,
    )
