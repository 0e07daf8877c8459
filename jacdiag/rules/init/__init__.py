"""The rules about init, JD201 to JD216: how every weight of a model was initialized."""
