"""The tiling core: masks, tile grid, moments, measuring, prediction, selection, tile map, audit."""
