"""What a model's routers do with a text, counted on the devices."""
