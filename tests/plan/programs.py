"""Texts of compiled programs, cut down from what XLA wrote for TPU and CPU: shapes and attributes
are as they were.
"""

from mixtral_jax.plan.hlo import Program, parse_program

# Three layers, in a loop whose limit is a constant of its condition; experts over 4 devices,
# weights over 2.
RAGGED = """\
HloModule jit_loss, is_scheduled=true

%body.1 (wide.param.1: (s32[], bf16[256,256], bf16[3,2,128,512], s32[4])) -> (s32[], bf16[256,256], bf16[3,2,128,512], s32[4]) {
  %constant.76 = s32[]{:T(128)} constant(1), metadata={op_name="jit(loss)/jvp()/while/body/add"}
  %wide.param.1 = (s32[]{:T(128)}, bf16[256,256]{1,0:T(8,128)(2,1)}, bf16[3,2,128,512]{3,2,1,0:T(8,128)(2,1)}, s32[4]{0:T(128)}) parameter(0)
  %get-tuple-element.306 = s32[]{:T(128)} get-tuple-element(%wide.param.1), index=0
  %copy.96 = s32[]{:T(128)S(6)} copy(%get-tuple-element.306)
  %add.83 = s32[]{:T(128)} add(%copy.96, %constant.76), metadata={op_name="jit(loss)/jvp()/while/body/add"}
  %get-tuple-element.307 = bf16[256,256]{1,0:T(8,128)(2,1)} get-tuple-element(%wide.param.1), index=1
  %get-tuple-element.317 = bf16[3,2,128,512]{3,2,1,0:T(8,128)(2,1)} get-tuple-element(%wide.param.1), index=2
  %get-tuple-element.318 = s32[4]{0:T(128)} get-tuple-element(%wide.param.1), index=3
  %dynamic-slice.2 = bf16[1,2,128,512]{3,2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%get-tuple-element.317, %copy.96), dynamic_slice_sizes={1,2,128,512}
  %all-gather.3 = bf16[1,2,256,512]{3,2,1,0:T(8,128)(2,1)} all-gather(%dynamic-slice.2), channel_id=2, replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={2}, use_global_device_ids=true, metadata={op_name="jit(loss)/jvp()/while/body/closed_call/shard_map/all_gather" stack_frame_id=26}
  %constant.83 = bf16[]{:T(256)} constant(0)
  %broadcast.120 = bf16[512,2,128]{2,1,0:T(2,128)(2,1)} broadcast(%get-tuple-element.307), dimensions={0,2}
  %broadcast.49 = bf16[1024,2,128]{2,1,0:T(2,128)(2,1)} broadcast(%constant.83), dimensions={}
  %broadcast.51 = bf16[512,2,128]{2,1,0:T(2,128)(2,1)} broadcast(%constant.83), dimensions={}
  %ragged_all_to_all.82 = bf16[1024,2,128]{2,1,0:T(2,128)(2,1)} ragged-all-to-all(%broadcast.120, %broadcast.49, %get-tuple-element.318, %get-tuple-element.318, %get-tuple-element.318, /*index=5*/%get-tuple-element.318), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, metadata={op_name="jit(loss)/jvp()/while/body/closed_call/shard_map/ragged_all_to_all" stack_frame_id=16}
  %ragged_all_to_all.83 = bf16[512,2,128]{2,1,0:T(2,128)(2,1)} ragged-all-to-all(%ragged_all_to_all.82, %broadcast.51, %get-tuple-element.318, %get-tuple-element.318, %get-tuple-element.318, /*index=5*/%get-tuple-element.318), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, metadata={op_name="jit(loss)/transpose(jvp())/while/body/closed_call/checkpoint/rematted_computation/shard_map/ragged_all_to_all" stack_frame_id=13}
  %all-reduce.7 = bf16[256,256]{1,0:T(8,128)(2,1)} all-reduce(%get-tuple-element.307), channel_id=5, replica_groups=[1,8]<=[8], use_global_device_ids=true, to_apply=%region_1.2
  ROOT %tuple.9 = (s32[]{:T(128)}, bf16[256,256]{1,0:T(8,128)(2,1)}, bf16[3,2,128,512]{3,2,1,0:T(8,128)(2,1)}, s32[4]{0:T(128)}) tuple(%add.83, %all-reduce.7, %get-tuple-element.317, %get-tuple-element.318)
}

%condition.2 (wide.param.27: (s32[], bf16[256,256], bf16[3,2,128,512], s32[4])) -> pred[] {
  %constant.70 = s32[]{:T(128)} constant(3), metadata={op_name="jit(loss)/jvp()/while/cond/lt" stack_frame_id=9}
  %wide.param.27 = (s32[]{:T(128)}, bf16[256,256]{1,0:T(8,128)(2,1)}, bf16[3,2,128,512]{3,2,1,0:T(8,128)(2,1)}, s32[4]{0:T(128)}) parameter(0)
  %get-tuple-element.264 = s32[]{:T(128)} get-tuple-element(%wide.param.27), index=0
  ROOT %lt.33 = pred[]{:T(512)} compare(%get-tuple-element.264, %constant.70), direction=LT, metadata={op_name="jit(loss)/jvp()/while/cond/lt" stack_frame_id=9}
}

%region_1.2 (reduce_sum.1: bf16[], reduce_sum.2: bf16[]) -> bf16[] {
  %reduce_sum.1 = bf16[]{:T(256)} parameter(0)
  %reduce_sum.2 = bf16[]{:T(256)} parameter(1)
  ROOT %add.1 = bf16[]{:T(256)} add(%reduce_sum.1, %reduce_sum.2)
}

ENTRY %main.12_spmd (param.22: bf16[256,256], param.23: bf16[3,2,128,512], param.24: s32[4]) -> bf16[256,256] {
  %constant.80 = s32[]{:T(128)} constant(0)
  %param.22 = bf16[256,256]{1,0:T(8,128)(2,1)} parameter(0), sharding={devices=[8,1]<=[8]}, metadata={op_name="x"}
  %param.23 = bf16[3,2,128,512]{3,2,1,0:T(8,128)(2,1)} parameter(1), metadata={op_name="ws"}
  %param.24 = s32[4]{0:T(128)} parameter(2)
  %copy.93 = s32[]{:T(128)} copy(%constant.80)
  %tuple.70 = (s32[]{:T(128)}, bf16[256,256]{1,0:T(8,128)(2,1)}, bf16[3,2,128,512]{3,2,1,0:T(8,128)(2,1)}, s32[4]{0:T(128)}) tuple(%copy.93, %param.22, %param.23, %param.24)
  %while.45 = (s32[]{:T(128)}, bf16[256,256]{1,0:T(8,128)(2,1)}, bf16[3,2,128,512]{3,2,1,0:T(8,128)(2,1)}, s32[4]{0:T(128)}) while(%tuple.70), condition=%condition.2, body=%body.1, metadata={op_name="jit(loss)/transpose(jvp())/while" stack_frame_id=8}
  ROOT %get-tuple-element.9 = bf16[256,256]{1,0:T(8,128)(2,1)} get-tuple-element(%while.45), index=1
}
"""

# An asynchronous all-gather, and a reduce-scatter as XLA on TPU fuses it.
ASYNCHRONOUS = """\
HloModule jit_step

%all-reduce-scatter.3 (param.1: f32[64,32]) -> f32[16,32] {
  %param.1 = f32[64,32]{1,0} parameter(0)
  %all-reduce.4 = f32[64,32]{1,0} all-reduce(%param.1), channel_id=3, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%add.7
  %constant.5 = s32[] constant(16)
  %partition-id.1 = u32[] partition-id()
  ROOT %dynamic-slice.6 = f32[16,32]{1,0} dynamic-slice(%all-reduce.4, %partition-id.1, %constant.5), dynamic_slice_sizes={16,32}
}

%add.7 (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add.8 = f32[] add(%x, %y)
}

ENTRY %main (p.0: f32[16,32]) -> f32[16,32] {
  %p.0 = f32[16,32]{1,0} parameter(0)
  %all-gather-start.1 = (f32[16,32]{1,0}, f32[64,32]{1,0}) all-gather-start(%p.0), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, use_global_device_ids=true, metadata={op_name="jit(step)/jvp()/all_gather"}
  %all-gather-done.1 = f32[64,32]{1,0} all-gather-done(%all-gather-start.1)
  %collective-permute.2 = f32[64,32]{1,0} collective-permute(%all-gather-done.1), channel_id=4, source_target_pairs={{0,1},{1,0},{2,3},{3,2}}, metadata={op_name="jit(step)/jvp()/ppermute"}
  ROOT %fusion.3 = f32[16,32]{1,0} fusion(%collective-permute.2), kind=kCustom, calls=%all-reduce-scatter.3, metadata={op_name="jit(step)/transpose(jvp())/reduce_scatter"}
}
"""

# Values weighted by attention, over 8 groups of 4 heads, 4096 keys; then a projection to 32 heads.
CONVOLUTIONS = """\
HloModule jit_step

ENTRY %main (v: bf16[4096,8,128,1], weights: bf16[8,4,4096,4096], x: bf16[4096,4096,1], w: bf16[4096,32,128]) -> bf16[4096,32,128] {
  %attended = bf16[8,128,4,4096]{3,1,2,0:T(8,128)(2,1)} convolution(%v, %weights), window={size=8x4 stride=7x1 pad=0_0x3_3 lhs_dilate=8x1 rhs_reversal=0x1}, dim_labels=f0b1_01oi->0b1f, metadata={op_name="BKGTS,BSKH->BTKGH"}
  %v = bf16[4096,8,128,1]{2,0,1,3} parameter(0)
  %weights = bf16[8,4,4096,4096]{3,2,1,0} parameter(1)
  %x = bf16[4096,4096,1]{1,0,2} parameter(2)
  %w = bf16[4096,32,128]{2,0,1} parameter(3)
  ROOT %projected = bf16[4096,32,128]{0,2,1:T(8,128)(2,1)} convolution(%x, %w), window={size=32 pad=31_31 rhs_reversal=1}, dim_labels=bf0_i0o->b0f, metadata={op_name="BTD,DNH->BTNH"}
}
"""


def ragged() -> Program:
    """The loop over layers with ragged all-to-alls."""
    return parse_program(RAGGED)


def asynchronous() -> Program:
    """Collectives in pieces."""
    return parse_program(ASYNCHRONOUS)


def convolutions() -> Program:
    """Matmuls as XLA on TPU writes them."""
    return parse_program(CONVOLUTIONS)
