"""The default model that ships in the wheel: animated emoji, trained on two CPU cores."""
