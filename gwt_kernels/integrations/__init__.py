"""GWTAdamW in other libraries' training loops: nothing here is imported before a user asks for it."""

__all__: list[str] = []
