"""A lossless HEVC encoder for the product's pictures, written from ITU-T H.265 (clauses in comments).

`encoder.encode_planes` is the `PlaneEncoder`; `warm_up` compiles it (numba, no GIL, cached on disk).

The structure of a stream is fixed, so that every coder of it (this one, and one on a GPU) gives the
same bytes; tests/data/golden/hevc holds them.

* An access unit is VPS, SPS, PPS and one IDR slice of type I; `headers` writes every bit of them.
* A picture is whole CTUs of 32x32, mid-grey beyond its sides (conformance window). Each CTU is one CU:
  cu_transquant_bypass, PART_2Nx2N, DC for luma and chroma (`coding_tree.put_cu_header`). Loop filters
  are off, persistent_rice_adaptation is on.
* Each row of CTUs is a substream (entropy_coding_sync): it begins with the contexts and StatCoeff that
  the row above had after its second CTU. Its bytes have emulation prevention of their own (the byte
  before each is never 0), and the slice header's entry points count them so.
* The transform tree of a CTU is one block of 32x32 (chroma of 4:2:0: 16x16), or four of 16x16 (4:4:4
  only), each component of each block predicted by `prediction.dc_value`. It is split when the sum of
  absolute residuals of all three components against the four values, without luma's filter, is lower
  by more than 24: DC of few noisy neighbours, or of one at an edge, is then farther from their mean.
* Tokens (`residual_coding`, `coding_tree`) do not hang on contexts, and `cabac` codes them; only
  StatCoeff goes from block to block of a row, in coding order.
* A picture whose slice data would take more than 1.03 times its samples' bits (see `encoder`) is coded
  as PCM instead (`pcm`), in one substream, if that is smaller. A GPU coder leaves such a picture to
  this one.
"""
