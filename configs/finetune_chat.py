r"""Fine-tunes a published decoder on your own conversations, with the loss on the answers alone (instruction tuning).

  python -m research.main --config=configs/finetune_chat.py --workdir=runs/chat --config.data.source.train=chats.jsonl

A line of the file: {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]}; the
first message may be of the role system, and any number of turns may follow. Each of these is said once and holds
everywhere:
  --config.data.source.train     the file: JSON lines, perhaps as .gz or .zst, or Parquet (or a folder, or a pattern, of
                                 them); or a data set of the hub, hf://datasets/ORG/NAME, and where a split is not
                                 called "train", hf://datasets/ORG/NAME#split=train_sft. One conversation in ten is
                                 held out and evaluated on
  --config.data.source.test      a file to evaluate on instead; a data set of the hub is its split "test"
  --config.data.source.held_out  another share than 0.1 (none with a test file)
  --config.data.source.messages  the field of the messages
  --config.init.path             the model: hf://ORG/NAME, a folder, or what --mode=export wrote; GPT-2, Llama, Mistral,
                                 Qwen2 and 3, Phi-3, OLMo 2, Gemma 1 to 3 and what is built alike
  --config.data.pack             tokens a row; longer conversations are cut, shorter ones packed together

Conversations are rendered with the model's chat template, else as ChatML. What is reported is the cross-entropy of the
answers' tokens, in nats, and their perplexity. Try the result with --mode=generate --prompt="...".
Recipe: AdamW at 1e-4, linearly down to 0 after a tenth of warm-up, 3 epochs, 8 rows of 1,024 tokens a step; billions of
parameters want 1e-5 to 2e-5. Expected: depends on the conversations.
Hardware: an accelerator. 6 operations a parameter and token: 6.6e12 a step for the 135 million of SmolLM2, which is
0.1 s of an A100 at 35 % of its peak of 312e12 a second, and a minute of 2 CPU cores that do 1e11.
`:lora` trains low-rank adapters of rank 16 beside the frozen kernels of attention and MLP, at 2e-4 and with a dropout
of 0.1 (as Dettmers 2023 has them for up to 13 billion parameters). `:qlora` does with these kernels in NF4, 4.5 bits a
parameter: 7 billion of them take 4 GB instead of 28. `:smollm2` is the same model, quantised to 4 bits, from the
package registry where the hub cannot be reached, on 4 rows of 256 tokens: about 10 s a step on 2 CPU cores;
`:smollm2-qlora` tunes adapters beside it. `:tiny` needs neither network nor files and takes seconds.
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

from research.configuration.variants import SMOLLM2, choose, derived, tiny_decoder, tiny_run

COLOURS = ("red", "blue", "green")


def get_config(variant: str = "") -> ConfigDict:
    path = FieldReference("hf://HuggingFaceTB/SmolLM2-135M-Instruct")
    test, length = FieldReference(""), FieldReference(1024)
    chat = dict(
        call="research.data.files.chat",
        train=placeholder(str),
        test=test,
        held_out=derived(test, lambda file: 0.0 if file else 0.1, float),
        messages=FieldReference("messages"),
    )

    def data(split: str | FieldReference) -> dict:
        return dict(
            call="research.data.dataset.Dataset",
            source=chat | dict(split=split),
            ops=[dict(call="research.data.chat.ChatTokens", max_length=length)],
            features=("input_ids", "targets", "target_mask", "attention_mask", "positions"),
            pack=length,
        )

    config = ConfigDict()
    config.seed = 0
    config.batch_size = 8
    config.num_epochs = 3.0
    config.tokenizer = dict(call="research.data.tokenizer.load", path=path)
    config.task = dict(
        call="research.tasks.causal_lm.CausalLM",
        logits_chunk=256,
        model=dict(call="research.pretrained.huggingface.load_model", path=path, kind="causal_lm"),
    )
    config.init = dict(path=path)
    config.data = data("train")
    held_out = derived(test, lambda file: "test" if file else "validation", str)
    config.evals = dict(test=dict(call="research.evaluators.means.Means", perplexity=True, data=data(held_out)))
    config.optimizer = dict(learning_rate=1e-4, schedule="linear", warmup=0.1, weight_decay=0.01, clip_norm=1.0)
    config.mesh = dict(data=-1, fsdp=1, model=1)
    config.checkpoint = dict(every_steps=500, keep=2)
    config.log = dict(every_steps=10, evaluate_every_steps=0)
    config.decoding = dict(max_new_tokens=256, chat=True, stop=("<|im_end|>",))  # the end of a turn in ChatML
    return choose(variant, VARIANTS, config)


def lora(config: ConfigDict, base_format: str = "float32") -> ConfigDict:
    config.task = dict(
        call="research.tasks.lora.LoRA",
        rank=16,
        alpha=16.0,
        dropout=0.1,
        targets=["layers/.*/kernel$"],
        base_format=base_format,
        task=config.task,
    )
    config.optimizer.update(learning_rate=2e-4, freeze=["^base/"])
    return config


def smollm2(config: ConfigDict) -> ConfigDict:
    config.init.path = SMOLLM2
    config.batch_size = 4
    config.data.pack = 256
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    config = tiny_decoder(config, num_layers=2, max_positions=128)
    records = []
    for thing in ("sky", "sea", "sun", "car"):
        for colour in COLOURS:
            said = {"user": f"{thing}: {colour}?", "assistant": f"{thing} is {colour}."}
            records.append({"messages": [{"role": role, "content": content} for role, content in said.items()]})
    for node in (config.data, config.evals.test.data):
        node.source = dict(call="research.data.source.examples", records=records)
        node.window = 3
    config.data.pack = 128
    return tiny_run(config)


def tiny_qlora(config: ConfigDict) -> ConfigDict:
    rate = tiny(config).optimizer.learning_rate
    config = lora(config, "nf4")
    config.task.whole = ["embedding$"]  # what is frozen was never trained
    config.optimizer.learning_rate = rate
    return config


VARIANTS = {
    "": lambda config: config,
    "lora": lora,
    "qlora": lambda config: lora(config, "nf4"),
    "smollm2": smollm2,
    "smollm2-qlora": lambda config: lora(smollm2(config), "nf4"),
    "tiny": tiny,
    "qlora-tiny": tiny_qlora,
}
