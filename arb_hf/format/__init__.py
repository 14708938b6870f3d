"""The packed format, version 2.

One linear layer ``[n, m]`` (n = out_features, m = in_features) is stored as these tensors. ``blocks`` is
``ceil(m / block_size)``; ``c`` is the number of salient columns of the whole layer.

========================  =============================  =====================================================
tensor                    type, shape                    holds
========================  =============================  =====================================================
``weight``                int32 ``[ceil(m/32), n]``      first plane: first sign of every column
``second_plane``          int32 ``[ceil(m/32), n]``      group of an ordinary column, second sign of a salient one
                          (one group: ``ceil(c/32)``)    (one group: second signs of salient columns only)
``salient_groups``        int32 ``[ceil(c/32), n]``      group of each salient weight (column-group bitmap only)
``salient_columns``       uint8 ``[ceil(m/8)]``          bit j%8 of byte j//8: is column j salient
``row_parameters``        scale type                     row scales, then row means
                          ``[blocks, slots, n]``
``row_absmax``            float16 ``[blocks, slots]``    int8 scales only: a row parameter is code * absmax / 127
``column_scales``         scale type ``[groups, m]``     arb-rc only, see below
``salient_column_scales`` scale type ``[extra, c]``      arb-rc only, where extra = 2 * salient_groups - groups > 0
========================  =============================  =====================================================

**Stored column order.** Within each block the salient columns come first, then the ordinary ones, each in ascending
order. Planes and ``column_scales`` follow this order over all m columns; a block starts at a multiple of its size,
hence (block sizes are multiples of 32) at a word boundary. The order is a function of ``salient_columns`` alone. Planes
and scales of salient columns only (``salient_groups``, ``salient_column_scales``, the one-group ``second_plane``) number
the salient columns of the layer 0..c-1 in ascending order, blocks one after the other without gaps.

**Bits.** Column k of a plane is bit k % 32 (from the least significant) of word k // 32; rows are the contiguous axis.
A set bit is a sign of +1, or the large-magnitude group. Bits past the last column are 0.

**Values**, with g the group, r the row parameters of the block and s = +-1:

* ordinary: ``r[g] * column_scales[g] * s``, or ``r[g] * s + r[mean g]``;
* salient: the same over two orders, ``r[groups + 2g] * k[2g] * s1 + r[groups + 2g + 1] * k[2g + 1] * s2`` (+ mean),
  where k is the list of a salient column's scales: its ``column_scales`` rows, then its ``salient_column_scales`` rows.

Slots of ``row_parameters``: scales of the ordinary groups, then for each salient group its first and second order, then
(methods with means) the means of the ordinary groups and of the salient groups. int8 column scales are code / 127.

Stored bits are those of the planes, bitmaps and scales plus the padding of a plane to whole words, at most 31 columns.

**Tables.** The input embedding and the head ``[rows, width]`` may be stored as int8 (since version 2;
``embeddings`` in the config names those that are):

==============  =========================  ================================================================
tensor          type, shape                holds
==============  =========================  ================================================================
``weight``      int8 ``[rows, width]``     codes, -127 to 127
``row_absmax``  float16 ``[rows]``         the largest magnitude of each row: a value is code * absmax / 127
==============  =========================  ================================================================

Where the model's own config ties the two, both are named and the tensors of one are stored, as those of dense ones are.

**What a reader checks** (:mod:`arb_hf.checks`). There is little that could disagree: salient columns are a bitmap, so
none is listed twice, and no permutation is stored. Checked are: exactly these tensors, of these types and shapes; as many
salient columns as the config says; no bit set past the last column; finite scales; int8 codes of at most 127; a ``row_absmax``
without a sign; of two tied tables both or neither named, and one stored. Scales may have any sign, but a zero has one spelling, +0.0: the writer turns -0.0, to which a small
negative scale rounds, into it, and a reader refuses it.

**Versions.** Version 1 had no int8 tables; the rest is the same. A checkpoint of an older version loads forever, with
the same bits:

* Whatever changes these tensors, what their bits mean, or how the config says which form they have is a new version:
  ``FORMAT_VERSION`` goes up, and :func:`pack` writes the new one only.
* The reader of an older version stays, chosen by the ``format_version`` of the config. It may turn what it read into
  today's form, never into other values. A file of a newer version than the reader's is refused, not guessed at.
* A new method or option that stores these tensors as described here needs no new version. A reader that lacks it
  refuses it by name.
* Golden files (``tests/data/golden``) are never written again. A new version, method, option or value adds its own;
  a test fails until it has.
"""

FORMAT_VERSION = 2
WORD = 32  # columns per int32 word of a plane
