"""Shapes that `umbel.base.shapes` reads from config.json are those of the models that transformers makes of it."""

from pathlib import Path

import pytest
import transformers

from umbel.base.shapes import LINEARS, linear_shapes


@pytest.mark.parametrize("base", ["tiny_llama", "tiny_mistral", "tiny_qwen2", "tiny_qwen3"])
@pytest.mark.parametrize("modules", [LINEARS, ("q_proj", "v_proj", "up_proj")])
def test_linear_shapes_are_those_of_the_real_model(
    base: str, modules: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    real = {
        name: tuple(module.weight.shape) for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in modules
    }
    shapes = linear_shapes(path, modules)
    assert shapes == real
    assert list(shapes) == list(real), "in the model's own order"
