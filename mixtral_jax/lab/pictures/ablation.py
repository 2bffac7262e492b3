"""All pictures of an ablation, in the order of the report.

To add one, write a function that draws it, in a module of its own, and call it here.
"""

from mixtral_jax.lab.ablation.results import Results
from mixtral_jax.lab.pictures.comparisons import draw_differences, draw_trade_off
from mixtral_jax.lab.pictures.curves import draw_balance, draw_losses
from mixtral_jax.lab.pictures.loads import draw_loads
from mixtral_jax.lab.pictures.style import Picture, choose_strokes


def draw_ablation(results: Results) -> list[Picture]:
    """Draws what the finished runs allow; without finished runs the list is empty."""
    if not any(result.done for result in results.arms):
        return []
    strokes = choose_strokes(
        [arm.name for arm in results.ablation.arms], results.ablation.reference
    )
    pictures = [draw_losses(results, strokes)]
    if results.reference.done and any(result.done for result in results.others):
        pictures.append(draw_differences(results, strokes))
    pictures += [draw_trade_off(results, strokes), draw_balance(results, strokes)]
    loads = draw_loads(results)
    return [*pictures, loads] if loads else pictures
