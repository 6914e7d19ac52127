"""How far compressed attention's weights of blocks are from where dense attention's mass lies."""
