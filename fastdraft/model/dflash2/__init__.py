"""DFlash2: DFlash with convolutions along a block, and a selector that chooses among each slot's candidates in turn."""
