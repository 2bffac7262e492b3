"""Speed on this machine: of the train step, and of a layer and of decoding beside transformers'."""
