"""`aat publish`: a complete Hub repository from a trained model, with a card of measured numbers."""
