"""All pictures of a report, in their order.

A new one is drawn in a module of its own, and gets a line here.
"""

from mixtral_jax.lab.ablation.results import Results
from mixtral_jax.lab.pictures.comparisons import draw_differences, draw_trade_off
from mixtral_jax.lab.pictures.curves import draw_balance, draw_losses
from mixtral_jax.lab.pictures.loads import draw_loads
from mixtral_jax.lab.pictures.style import Picture, choose_strokes


def draw_pictures(results: Results) -> list[Picture]:
    """What the finished runs allow: without any, nothing."""
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
