"""Tensors left on the CPU, one in each section that computes, and what the pretended device says.

    PYTHONPATH=tests/pretend:. python tests/planted_mixes.py FOLDER     a JSON object {plant: error}

A plant changes one expression of a function; what runs then is the part of a run that uses it.
"""

import inspect
import json
import sys
import textwrap

import torch

sys.path.insert(0, "bench")

import launches

import train_gpt as golf

# (section, function, an expression of it, what it is changed to, the work that meets it)
PLANTS = [
    (6, "rope_tables", "dims, 2, device=device, ", "dims, 2, ", "logits"),
    (7, "BankShard.__init__", "torch.zeros_like(bank.data)", "torch.zeros(bank.shape)", "train"),
    (8, "WeightAverage.__init__", "p.clone()", "p.cpu()", "train"),
    (9, "gptq_factor", ", device=gram.device", "", "factor"),
    (10, "HalfTensor.tensor", "torch.from_numpy(", "torch.ones(3).to('pretend') * (", "load"),
    (11, "Grid.places", ", device=numbers.device", "", "columns"),
    (12, "numbers", ", device=device", "", "count"),
    (13, "backoff_logp", ", device=place.device", "", "backoff"),
    (14, "CalibratedMixer.__init__", "hints, dtype=torch.int64, device=device", "hints", "mix"),
    (15, "Evaluation.mix_inputs", "end].to(tokens.device) for", "end] for", "mix"),
    (16, "CodedWindows.logits", "inputs.to(neural.tokens.device)", "inputs", "decode"),
]


def planted(name: str, old: str, new: str):
    """Change an expression in a function's source; a function that puts it back."""
    owner, _, attribute = name.rpartition(".")
    owner = getattr(golf, owner) if owner else golf
    original = getattr(owner, attribute)
    source = textwrap.dedent(inspect.getsource(original))
    assert source.count(old) == 1, (name, old)
    space: dict = {}
    exec(source.replace(old, new), vars(golf), space)
    setattr(owner, attribute, space[attribute])
    return lambda: setattr(owner, attribute, original)


class Works:
    """Parts of a run on the pretended device, by name."""

    def __init__(self, folder: str):
        self.cfg, self.run, self.data = launches.start(folder, MTP_NUM_HEADS="0")
        self.model = golf.build_model(self.cfg, self.run)
        tensors = {n: p.detach().cpu() for n, p in self.model.named_parameters()}
        vocabulary = self.data.corpus["vocabulary_sha256"]
        self.blob = golf.pack(golf.quantize(tensors, self.cfg), self.cfg, vocabulary)
        self.tokens = self.data.val.to(self.run.device, torch.int32)
        self.evaluation = None

    def logits(self):
        self.model.logits(self.tokens[None, :32].long())

    def train(self):
        trainer = golf.Trainer(self.model, self.data, self.cfg, self.run)
        trainer.average = golf.WeightAverage(self.model, self.cfg)
        trainer.optimizer = golf.Optimizer(self.model, self.cfg, self.run)
        trainer.take_step()

    def factor(self):
        golf.gptq_factor(torch.eye(8, device=self.run.device)[None])

    def load(self):
        return golf.load_network(self.blob, self.data, self.cfg, self.run)

    def columns(self):
        cfg, model, network = self.load()
        made = golf.Evaluation(model, self.data, cfg, self.run, network, blob=self.blob)
        made.neural_pass()
        made.score("calibrated", 0.0)
        self.evaluation = made

    def count(self):
        for _ in golf.count_ngrams(self.tokens, 3):
            pass

    def backoff(self):
        self.evaluation.score("backoff_exact", 0.0)

    def mix(self):
        self.evaluation.score("calibrated", 0.0)

    def decode(self):
        golf.audit_decodable(self.evaluation)


def main() -> int:
    works, found = Works(sys.argv[1]), {}
    for name in ("logits", "train", "factor", "columns", "mix", "backoff", "count"):
        getattr(works, name)()  # without a plant all is well
    for section, function, old, new, work in PLANTS:
        restore = planted(function, old, new)
        try:
            getattr(works, work)()
        except (RuntimeError, TypeError) as error:
            found[f"{section} {function}"] = str(error)
        restore()
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
