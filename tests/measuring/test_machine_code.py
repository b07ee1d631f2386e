"""How compiled code is read: instructions on the hot path, bytes of tensors, widths of accesses."""

import pytest

from benchmarks.static import machine_code

LISTING = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/              @!P0 BRA 0x40 ;
        /*0020*/                   MUFU.SIN R4, R4 ;
        /*0030*/                   MUFU.COS R5, R5 ;
        /*0040*/               @P1 EXIT ;
        /*0050*/                   NOP ;
        /*0060*/              @!P2 STG.E.128 desc[UR4][R2.64], R4 ;
        /*0070*/              @!P2 BRA 0x0 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90;
"""


def test_hot_path_skips_what_a_branch_can_skip():
    opcodes = [instruction.split()[0] for instruction in machine_code.hot_path(LISTING)]
    assert opcodes == ["LDG.E.128", "BRA", "EXIT", "STG.E.128", "BRA", "EXIT"]


def test_bytes_are_counted_from_the_types_of_tensors():
    ttgir = """
    %a = tt.load %p : !tt.ptr<i64> loc(#loc1)
    %b = tt.load %q, %m : tensor<2048x!tt.ptr<bf16>, #blocked> loc(#loc2)
    %c = tt.load %q, %m evictionPolicy = evict_last : tensor<2048x!tt.ptr<i64>, #blocked> loc(#loc2)
    %c = tt.load %q {cachePolicy = #tt<eviction_policy = evict_last>} : tensor<2048x!tt.ptr<i64>, #blocked> loc(#loc2)
    %d = amdg.buffer_load %p[%o], %m {contiguity = 8 : i32} : tensor<1x512xf32, #blocked> loc(#loc3)
    %e = amdg.buffer_load %p[%o], %m {contiguity = 8 : i32} : !tt.ptr<f32> -> tensor<256xf32, #blocked> loc(#loc3)
    tt.store %q, %v, %m : tensor<2048x!tt.ptr<i1>, #blocked> loc(#loc4)
    """
    assert machine_code.tensor_bytes(ttgir) == {"load": 4096 + 2048 + 1024, "store": 2048}
    assert machine_code.tensor_bytes(ttgir, threads=512) == {"load": 4096 + 2048, "store": 2048}
    assert machine_code.largest_tensor(ttgir) == 2048


def test_narrowest_access():
    assert machine_code.narrowest([64, 128, 32, 128], 32) == 128
    assert machine_code.narrowest([64, 128, 32], 24) == 64
    assert machine_code.narrowest([32], 0) is None
    with pytest.raises(RuntimeError, match="40 bytes"):
        machine_code.narrowest([128, 128], 40)
