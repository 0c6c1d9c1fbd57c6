"""A scheduled program for four devices in the form in which libtpu 0.0.42 writes it, shortened.

Its mesh is data 2 x fsdp 2. The loop runs three times. An asynchronous all-gather over fsdp starts
in one fusion, goes on beside a product in a second and ends in a third; a permute runs beside
nothing; a reduce-scatter over data hides in a fusion. After the loop comes one whose turns are not
known, with an all-to-all, and an all-reduce of two arrays over all devices.
"""

PROGRAM = """\
HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

%add.1 (a.1: f32[], b.1: f32[]) -> f32[] {
  %a.1 = f32[]{:T(128)} parameter(0)
  %b.1 = f32[]{:T(128)} parameter(1)
  ROOT %add.2 = f32[]{:T(128)} add(%a.1, %b.1)
}

%starts (param_0.1: bf16[64,256]) -> (bf16[64,256], bf16[128,256], s32[2], u32[]) {
  %param_0.1 = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[128,256]{1,0:T(8,128)(2,1)} all-gather(%param_0.1), channel_id=3, replica_groups=mesh['axis_0'=1,'axis_1'=2,'axis_2'=2], device_ids=([2,2]T(1,0)) {'axis_1'}, dimensions={0}, use_global_device_ids=true, metadata={op_name="jit(step)/while/body/gather" stack_frame_id=1}
  ROOT %custom-call.1 = (bf16[64,256]{1,0:T(8,128)(2,1)S(1)}, bf16[128,256]{1,0:T(8,128)(2,1)S(1)}, s32[2]{0:S(4)}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%carries (p.0: bf16[32,128], p.1: bf16[128,512], p.2: bf16[64,256], p.3: bf16[128,256], p.4: s32[2], p.5: u32[]) -> (bf16[32,512], bf16[64,256], bf16[128,256], s32[2], u32[]) {
  %p.0 = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = bf16[128,512]{1,0:T(8,128)(2,1)} parameter(1)
  %convolution.1 = bf16[32,512]{1,0:T(8,128)(2,1)} convolution(%p.0, %p.1), dim_labels=bf_io->bf, metadata={op_name="jit(step)/while/body/product"}
  %p.2 = bf16[64,256]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  %p.3 = bf16[128,256]{1,0:T(8,128)(2,1)S(1)} parameter(3)
  %all-gather.2 = bf16[128,256]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.2), channel_id=3, replica_groups=mesh['axis_0'=1,'axis_1'=2,'axis_2'=2], device_ids=([2,2]T(1,0)) {'axis_1'}, dimensions={0}, use_global_device_ids=true
  %p.4 = s32[2]{0:S(4)} parameter(4)
  %p.5 = u32[]{:S(2)} parameter(5)
  ROOT %tuple.1 = (bf16[32,512]{1,0:T(8,128)(2,1)}, bf16[64,256]{1,0:T(8,128)(2,1)S(1)}, bf16[128,256]{1,0:T(8,128)(2,1)S(1)}, s32[2]{0:S(4)}, u32[]{:S(2)}) tuple(%convolution.1, %p.2, %all-gather.2, %p.4, %p.5)
}

%ends (q.2: bf16[64,256], q.3: bf16[128,256], q.4: s32[2], q.5: u32[]) -> bf16[128,256] {
  %q.2 = bf16[64,256]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %q.3 = bf16[128,256]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %all-gather.3 = bf16[128,256]{1,0:T(8,128)(2,1)} all-gather(%q.2), channel_id=3, replica_groups=mesh['axis_0'=1,'axis_1'=2,'axis_2'=2], device_ids=([2,2]T(1,0)) {'axis_1'}, dimensions={0}, use_global_device_ids=true
  %q.4 = s32[2]{0:S(4)} parameter(2)
  %q.5 = u32[]{:S(2)} parameter(3)
  ROOT %custom-call.2 = bf16[128,256]{1,0:T(8,128)(2,1)S(1)} custom-call(%q.2, %q.3, %all-gather.3, %q.4, %q.5), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (input.1: f32[64,256]) -> f32[32,256] {
  %input.1 = f32[64,256]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[64,256]{1,0:T(8,128)} all-reduce(%input.1), channel_id=5, replica_groups=[2,2]<=[2,2]T(1,0), use_global_device_ids=true, to_apply=%add.1
  %offset.1 = s32[]{:T(128)} constant(0)
  ROOT %dynamic-slice.1 = f32[32,256]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %offset.1, %offset.1), dynamic_slice_sizes={32,256}
}

%slice_fusion (s.0: bf16[3,128,512], s.1: s32[]) -> bf16[128,512] {
  %s.0 = bf16[3,128,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %s.1 = s32[]{:T(128)S(6)} parameter(1)
  %zero.1 = s32[]{:T(128)} constant(0)
  %dynamic-slice.2 = bf16[1,128,512]{2,1,0:T(8,128)(2,1)} dynamic-slice(%s.0, %s.1, %zero.1, %zero.1), dynamic_slice_sizes={1,128,512}
  ROOT %bitcast.1 = bf16[128,512]{1,0:T(8,128)(2,1)} bitcast(%dynamic-slice.2)
}

%write_fusion (w.0: f32[3,32,256], w.1: f32[32,256], w.2: s32[]) -> f32[3,32,256] {
  %w.0 = f32[3,32,256]{2,1,0:T(8,128)} parameter(0)
  %w.1 = f32[32,256]{1,0:T(8,128)} parameter(1)
  %bitcast.2 = f32[1,32,256]{2,1,0:T(8,128)} bitcast(%w.1)
  %w.2 = s32[]{:T(128)S(6)} parameter(2)
  %zero.2 = s32[]{:T(128)} constant(0)
  ROOT %dynamic-update-slice.1 = f32[3,32,256]{2,1,0:T(8,128)} dynamic-update-slice(%w.0, %bitcast.2, %w.2, %zero.2, %zero.2)
}

%body (state.1: (s32[], bf16[32,128], bf16[3,128,512], f32[3,32,256])) -> (s32[], bf16[32,128], bf16[3,128,512], f32[3,32,256]) {
  %one.1 = s32[]{:T(128)} constant(1)
  %state.1 = (s32[]{:T(128)}, bf16[32,128]{1,0:T(8,128)(2,1)}, bf16[3,128,512]{2,1,0:T(8,128)(2,1)}, f32[3,32,256]{2,1,0:T(8,128)}) parameter(0)
  %turn.1 = s32[]{:T(128)S(6)} get-tuple-element(%state.1), index=0
  %x.1 = bf16[32,128]{1,0:T(8,128)(2,1)} get-tuple-element(%state.1), index=1
  %stack.1 = bf16[3,128,512]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state.1), index=2
  %sums.1 = f32[3,32,256]{2,1,0:T(8,128)} get-tuple-element(%state.1), index=3
  %fusion.1 = bf16[128,512]{1,0:T(8,128)(2,1)} fusion(%stack.1, %turn.1), kind=kLoop, calls=%slice_fusion
  %mine.1 = bf16[64,256]{1,0:T(8,128)(2,1)} bitcast(%fusion.1)
  %async-collective-start = (bf16[64,256]{1,0:T(8,128)(2,1)S(1)}, bf16[128,256]{1,0:T(8,128)(2,1)S(1)}, s32[2]{0:S(4)}, u32[]{:S(2)}) fusion(%mine.1), kind=kCustom, calls=%starts
  %gte.1 = bf16[64,256]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%async-collective-start), index=0
  %gte.2 = bf16[128,256]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%async-collective-start), index=1
  %gte.3 = s32[2]{0:S(4)} get-tuple-element(%async-collective-start), index=2
  %gte.4 = u32[]{:S(2)} get-tuple-element(%async-collective-start), index=3
  %fusion.2 = (bf16[32,512]{1,0:T(8,128)(2,1)}, bf16[64,256]{1,0:T(8,128)(2,1)S(1)}, bf16[128,256]{1,0:T(8,128)(2,1)S(1)}, s32[2]{0:S(4)}, u32[]{:S(2)}) fusion(%x.1, %fusion.1, %gte.1, %gte.2, %gte.3, /*index=5*/%gte.4), kind=kOutput, calls=%carries
  %gte.5 = bf16[64,256]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%fusion.2), index=1
  %gte.6 = bf16[128,256]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%fusion.2), index=2
  %gte.7 = s32[2]{0:S(4)} get-tuple-element(%fusion.2), index=3
  %gte.8 = u32[]{:S(2)} get-tuple-element(%fusion.2), index=4
  %async-collective-done = bf16[128,256]{1,0:T(8,128)(2,1)S(1)} fusion(%gte.5, %gte.6, %gte.7, %gte.8), kind=kCustom, calls=%ends
  %collective-permute-start = (bf16[32,128]{1,0:T(8,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x.1), channel_id=4, source_target_pairs={{0,0},{2,1},{1,2},{3,3}}, metadata={op_name="jit(step)/while/body/turn"}
  %collective-permute-done = bf16[32,128]{1,0:T(8,128)(2,1)} collective-permute-done(%collective-permute-start)
  %wide.1 = f32[64,256]{1,0:T(8,128)} convert(%gte.6)
  %fusion.3 = f32[32,256]{1,0:T(8,128)} fusion(%wide.1), kind=kCustom, calls=%all-reduce-scatter.1
  %fusion.4 = f32[3,32,256]{2,1,0:T(8,128)} fusion(%sums.1, %fusion.3, %turn.1), kind=kLoop, calls=%write_fusion
  %next.1 = s32[]{:T(128)} add(%turn.1, %one.1)
  ROOT %tuple.2 = (s32[]{:T(128)}, bf16[32,128]{1,0:T(8,128)(2,1)}, bf16[3,128,512]{2,1,0:T(8,128)(2,1)}, f32[3,32,256]{2,1,0:T(8,128)}) tuple(%next.1, %collective-permute-done, %stack.1, %fusion.4)
}

%condition (state.2: (s32[], bf16[32,128], bf16[3,128,512], f32[3,32,256])) -> pred[] {
  %limit.1 = s32[]{:T(128)} constant(3)
  %state.2 = (s32[]{:T(128)}, bf16[32,128]{1,0:T(8,128)(2,1)}, bf16[3,128,512]{2,1,0:T(8,128)(2,1)}, f32[3,32,256]{2,1,0:T(8,128)}) parameter(0)
  %turn.2 = s32[]{:T(128)} get-tuple-element(%state.2), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%turn.2, %limit.1), direction=LT
}

%rounds_body (state.3: (s32[], s32[], f32[8,128])) -> (s32[], s32[], f32[8,128]) {
  %state.3 = (s32[]{:T(128)}, s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %turn.3 = s32[]{:T(128)} get-tuple-element(%state.3), index=0
  %count.3 = s32[]{:T(128)} get-tuple-element(%state.3), index=1
  %sent.1 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%state.3), index=2
  %all-to-all.1 = f32[8,128]{1,0:T(8,128)} all-to-all(%sent.1), channel_id=6, replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %tuple.3 = (s32[]{:T(128)}, s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%turn.3, %count.3, %all-to-all.1)
}

%rounds_condition (state.4: (s32[], s32[], f32[8,128])) -> pred[] {
  %state.4 = (s32[]{:T(128)}, s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %turn.4 = s32[]{:T(128)} get-tuple-element(%state.4), index=0
  %count.4 = s32[]{:T(128)} get-tuple-element(%state.4), index=1
  ROOT %lt.2 = pred[]{:T(512)} compare(%turn.4, %count.4), direction=LT
}

ENTRY %main.1 (x.0: bf16[32,128], stack.0: bf16[3,128,512], sums.0: f32[3,32,256], count.0: s32[], sent.0: f32[8,128]) -> (f32[8,128], f32[]) {
  %x.0 = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="state.params[\\'x\\']"}
  %stack.0 = bf16[3,128,512]{2,1,0:T(8,128)(2,1)} parameter(1), metadata={op_name="state.params[\\'stack\\']"}
  %sums.0 = f32[3,32,256]{2,1,0:T(8,128)} parameter(2)
  %count.0 = s32[]{:T(128)} parameter(3)
  %sent.0 = f32[8,128]{1,0:T(8,128)} parameter(4)
  %zero.0 = s32[]{:T(128)} constant(0)
  %start.0 = s32[]{:T(128)} copy(%zero.0)
  %tuple.4 = (s32[]{:T(128)}, bf16[32,128]{1,0:T(8,128)(2,1)}, bf16[3,128,512]{2,1,0:T(8,128)(2,1)}, f32[3,32,256]{2,1,0:T(8,128)}) tuple(%start.0, %x.0, %stack.0, %sums.0)
  %while.1 = (s32[]{:T(128)}, bf16[32,128]{1,0:T(8,128)(2,1)}, bf16[3,128,512]{2,1,0:T(8,128)(2,1)}, f32[3,32,256]{2,1,0:T(8,128)}) while(%tuple.4), condition=%condition, body=%body, metadata={op_name="jit(step)/while"}
  %tuple.5 = (s32[]{:T(128)}, s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%start.0, %count.0, %sent.0)
  %while.2 = (s32[]{:T(128)}, s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%tuple.5), condition=%rounds_condition, body=%rounds_body, metadata={op_name="jit(step)/rounds"}
  %kernel.1 = f32[8,128]{1,0:T(8,128)} custom-call(%sent.0), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/kernel
a second line"}
  %total.1 = f32[]{:T(128)} reduce(%kernel.1, %zero.0), dimensions={0,1}, to_apply=%add.1
  %all-reduce.2 = (f32[8,128]{1,0:T(8,128)}, f32[]{:T(128)}) all-reduce(%kernel.1, %total.1), channel_id=7, replica_groups={}, use_global_device_ids=true, to_apply=%add.1
  %out.1 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%all-reduce.2), index=0
  %out.2 = f32[]{:T(128)} get-tuple-element(%all-reduce.2), index=1
  ROOT %tuple.6 = (f32[8,128]{1,0:T(8,128)}, f32[]{:T(128)}) tuple(%out.1, %out.2)
}
"""  # noqa: E501

MESH = {"replica": 1, "data": 2, "fsdp": 2}

ASSIGNMENT = """\
BufferAssignment:
allocation 0: size 512, thread-local:
 value: <2 add.2 @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 8192, parameter 0, shape |bf16[32,128]| at ShapeIndex {}, maybe-live-out:
 value: <40 x.0 @0> (size=8192,offset=0): bf16[32,128]{1,0:T(8,128)(2,1)}
allocation 2: size 393216, parameter 1, shape |bf16[3,128,512]| at ShapeIndex {}:
 value: <41 stack.0 @0> (size=393216,offset=0): bf16[3,128,512]{2,1,0:T(8,128)(2,1)}
allocation 3: size 4608, output shape is |(f32[8,128], f32[])|, maybe-live-out:
 value: <42 all-reduce.2{0} @0> (size=4096,offset=0): f32[8,128]{1,0:T(8,128)}
 value: <43 all-reduce.2{1} @0> (size=512,offset=4096): f32[]{:T(128)}
allocation 4: size 262144, preallocated-temp:
 value: <44 fusion.1 @0> (size=131072,offset=0): bf16[128,512]{1,0:T(8,128)(2,1)}
 value: <45 wide.1 @0> (size=131072,offset=0): f32[64,256]{1,0:T(8,128)}
 value: <46 fusion.2{0} @0> (size=131072,offset=131072): bf16[32,512]{1,0:T(8,128)(2,1)}
allocation 5: size 58720256, color 1, preallocated-temp:
 value: <47 gte.6 @1> (size=65536,offset=0): bf16[128,256]{1,0:T(8,128)(2,1)S(1)}
"""
