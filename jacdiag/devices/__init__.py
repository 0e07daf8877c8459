"""The devices that torch knows: what each can do, what memory is free, and copies to the host."""
