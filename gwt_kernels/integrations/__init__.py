"""GWTAdamW in training loops of other libraries; each module is imported by the user only."""

__all__: list[str] = []
