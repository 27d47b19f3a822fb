"""What `python train_gpt.py --help` prints."""

import train_gpt as golf
from tools.variables import WITHOUT_EFFECT

SECTIONS = dict(  # by the section's first field
    recipe="Run", data_path="Data", num_layers="Model", iterations="Training", scoring="Scoring",
    matrix_lr="Optimizers", gptq_seconds="Artifact", eval_seq_len="Evaluation")


def help_text() -> str:
    """Every variable with default and meaning, by section, and the recipes."""
    lines = [golf.__doc__.strip(), "", "Variables, with defaults"]
    for name, f in golf.FIELDS.items():
        lines += ["", SECTIONS[name]] if name in SECTIONS else []
        choices = ", ".join(f.metadata["allowed"]) if f.type == "str" else ""
        names = " / ".join([name.upper(), *(a for a, n in golf.ALIASES.items() if n == name)])
        demo = f"; demo: {golf.DEMO[name]}" if name in golf.DEMO else ""
        lines += [f"  {names}={str(f.default).strip('()')}{demo}",
                  f"      {f.metadata['meaning']}" + (f" ({choices})" if choices else "")]
    lines += ["", "Recipes: what differs from the defaults above"]
    lines += [" ".join([f"  RECIPE={name}:", *(f"{k.upper()}={v}" for k, v in recipe.items())])
              for name, recipe in golf.RECIPES.items()]
    idle = [f"  {name}: {reason}" for name, reason in WITHOUT_EFFECT.items()]
    return "\n".join([*lines, "", "Accepted without effect (logged)", *idle])
