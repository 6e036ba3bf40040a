"""The mathematics: pure functions of arrays, which know no files, no meshes and no training loop."""
