"""How other programs name and describe a Mixtral: the only place that speaks their words."""
