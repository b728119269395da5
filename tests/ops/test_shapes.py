import itertools

import pytest
import torch

from trl_ext.ops._shapes import Layout, group_heads, make_layout

CPU = torch.device("cpu")
DOCUMENTS = torch.tensor([[3, 3, 3, 7, 7, 3, 3], [0, 0, 0, 0, 0, 0, 1]])
FIRST_KEY = [[0, 0, 0, 3, 3, 5, 5], [0, 0, 0, 0, 0, 0, 6]]
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 1, 1]])


def tensors(queries=7, keys=7, heads=4, kv_heads=2, dtype=torch.float32):
    q = torch.zeros(2, heads, queries, 4, dtype=dtype)
    return q, *(torch.zeros(2, kv_heads, keys, 4, dtype=dtype) for _ in "kv")


def layout_of(*qkv, attention_mask=None, document_ids=None, query_offset=None):
    return make_layout(
        *qkv, attention_mask=attention_mask, document_ids=document_ids, query_offset=query_offset
    )


def sees(row, i, j, *, documents, mask, strict=False):
    """The definition, a pair of slots at a time."""
    own = not documents or FIRST_KEY[row][i] <= j
    return own and (not mask or bool(MASK[row, j])) and (j < i if strict else j <= i)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("documents", "mask"), [*itertools.product([False, True], repeat=2)])
def test_every_tile_shows_the_pairs_of_the_definition(documents, mask, strict):
    q, k, v = tensors(queries=5)
    layout = layout_of(
        *(q, k, v),
        attention_mask=MASK if mask else None,
        document_ids=DOCUMENTS if documents else None,
    )
    for start, end in itertools.combinations(range(6), 2):
        for first, last in itertools.combinations(range(8), 2):
            tile = layout.visible(range(start, end), range(first, last), CPU, strict=strict)
            expected = torch.tensor(
                [
                    [
                        [
                            sees(b, i + 2, j, documents=documents, mask=mask, strict=strict)
                            for j in range(first, last)
                        ]
                        for i in range(start, end)
                    ]
                    for b in range(2)
                ]
            )
            if tile is None:
                assert expected.all()
            else:
                assert tile.dim() == 5
                assert torch.equal(tile[:, 0, 0].expand_as(expected), expected)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("queries", "offset"), [(7, 0), (3, 4), (3, 1), (1, 6)])
def test_tiles_hold_each_visible_pair_once_and_no_later_key(queries, offset, documents):
    q, k, v = tensors(queries=queries)
    layout = layout_of(q, k, v, document_ids=DOCUMENTS if documents else None, query_offset=offset)
    for query_block, key_block in itertools.product([1, 2, 3, 9], repeat=2):
        seen = torch.zeros(queries, 7, dtype=torch.long)
        for rows, blocks in layout.tiles(queries, query_block, key_block):
            assert len(rows) <= query_block
            assert blocks == sorted(blocks, key=lambda block: block.start)
            for block in blocks:
                assert 0 < len(block) <= key_block
                seen[rows.start : rows.stop, block.start : block.stop] += 1
                assert block.stop <= rows.stop + offset
        for i, j in itertools.product(range(queries), range(7)):
            needed = any(sees(b, i + offset, j, documents=documents, mask=False) for b in range(2))
            assert seen[i, j] <= 1 and (seen[i, j] == 1 or not needed)


def test_tiles_leave_out_documents_that_nobody_in_the_block_belongs_to():
    q, k, v = (x[:1] for x in tensors())
    layout = layout_of(q, k, v, document_ids=DOCUMENTS[:1])
    assert list(layout.tiles(7, 5, 9))[1] == (range(5, 7), [range(5, 7)])


def test_distances_count_real_tokens():
    q, k, v = tensors(queries=3)
    plain = layout_of(q, k, v).distance(range(0, 3), range(1, 7), CPU)[0, 0, 0]
    assert plain.tolist() == [[3, 2, 1, 0, 1, 2], [4, 3, 2, 1, 0, 1], [5, 4, 3, 2, 1, 0]]
    masked = layout_of(q, k, v, attention_mask=MASK).distance(range(1, 3), range(7), CPU)
    assert masked[0, 0, 0].tolist() == [[5, 4, 3, 2, 1, 0, 1], [6, 5, 4, 3, 2, 1, 0]]
    real = [2, 3, 5, 6]  # tokens 0, 1, 2, 3 of row 1
    assert masked[1, 0, 0][:, real].tolist() == [[2, 1, 0, 1], [3, 2, 1, 0]]


def test_a_document_is_a_run_of_equal_numbers():
    layout = layout_of(*tensors(), document_ids=DOCUMENTS)
    assert layout.first_key_BT is not None
    assert layout.first_key_BT.tolist() == FIRST_KEY


def test_queries_are_the_last_keys_unless_told_otherwise():
    assert layout_of(*tensors(queries=2)) == Layout(5)
    assert layout_of(*tensors(queries=2), query_offset=3) == Layout(3)


def test_consecutive_query_heads_share_a_key_head():
    heads = torch.arange(6).view(1, 6, 1, 1)
    assert group_heads(heads, 2)[0, :, :, 0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_what_does_not_fit_is_refused():
    q, k, v = tensors()
    cases = [
        ((q[0], k, v), {}, r"q has shape \(4, 7, 4\)"),
        ((q, k.double(), v), {}, "k has dtype torch.float64 and q torch.float32"),
        ((q.long(), k.long(), v.long()), {}, "q has dtype torch.int64"),
        ((q, k[:1], v[:1]), {}, "k has 1 rows and q 2"),
        ((q, k, v[:, :, :5]), {}, "each key needs one value"),
        ((q[..., :3], k, v), {}, "q has head width 3 and k 4"),
        ((q[:, :3], k, v), {}, "q has 3 heads and k 2"),
        ((q, k[:, :, :5], v[:, :, :5]), {}, "q has 7 positions and k only 5"),
        ((q, k, v), {"query_offset": 1}, "query_offset=1 puts 7 queries outside the 7 slots"),
        ((q[:, :, :2], k, v), {"query_offset": -1}, "query_offset=-1"),
        ((q, k, v), {"attention_mask": MASK[:, :5]}, r"attention_mask has shape \(2, 5\)"),
        ((q, k, v), {"attention_mask": MASK.float()}, "one integer or boolean"),
        ((q, k, v), {"document_ids": DOCUMENTS[0]}, r"document_ids has shape \(7,\)"),
    ]
    for qkv, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            layout_of(*qkv, **arguments)
