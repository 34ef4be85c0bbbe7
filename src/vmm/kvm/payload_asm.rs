//! The text of the KVM guest's program: the loop of [`workload`](crate::vmm::workload)
//! at CPL 3 and the few ring-0 stubs that interrupts and exceptions enter.
//!
//! It is data to this process, which only copies it into guest memory; nothing in it
//! refers to the address where it stands. Between two instructions everything lies in
//! registers and guest memory, so the guest may be stopped anywhere and go on elsewhere.
//!
//! ```text
//! rbx  n, pages in the slice    r8   t0, start of the step   r12  first page of the slice
//! rbp  vseed                    r9   seed                    r13  s, steps completed
//! rdi  h of the step            r10  lane                    r14  G
//! rsi  page, then its address   r11  cursor                  r15  the control page
//! rax, rcx, rdx  scratch        rsp  unused at CPL 3
//! ```

use super::tables::{DOORBELL, EXCEPTION_STUB_BYTES, LAPIC_EOI, VBASE};
use crate::vmm::workload::{STATUS_FAILED, STATUS_FINISHED, control};
use core::arch::global_asm;

global_asm!(
    r#"
    .pushsection .rodata.postcopy_payload, "a", @progbits

    // rax = mix(rax); rcx is lost.
    .macro postcopy_mix
        mov     rcx, rax
        shr     rcx, 30
        xor     rax, rcx
        movabs  rcx, 0xBF58476D1CE4E5B9
        imul    rax, rcx
        mov     rcx, rax
        shr     rcx, 27
        xor     rax, rcx
        movabs  rcx, 0x94D049BB133111EB
        imul    rax, rcx
        mov     rcx, rax
        shr     rcx, 31
        xor     rax, rcx
    .endm

    // rax = the time-stamp counter; rdx is lost.
    .macro postcopy_now
        rdtsc
        shl     rdx, 32
        or      rax, rdx
    .endm

    .balign 64
    .globl  postcopy_payload_start
    .hidden postcopy_payload_start
postcopy_payload_start:

    // Exceptions: the VMM learns the vector from the address and stops the vCPU.
    .set    .Lpc_vector, 0
    .rept   32
    .balign {stub}
77: mov     dword ptr [{doorbell} + 1024 + 4 * .Lpc_vector], eax
    jmp     77b
    .set    .Lpc_vector, .Lpc_vector + 1
    .endr

    .balign {stub}
    .globl  postcopy_payload_timer
    .hidden postcopy_payload_timer
postcopy_payload_timer:
    inc     qword ptr gs:[{ticks}]
    mov     dword ptr [{eoi}], 0
    .globl  postcopy_payload_spurious
    .hidden postcopy_payload_spurious
postcopy_payload_spurious:
    iretq

    .balign 64
    .globl  postcopy_payload_entry
    .hidden postcopy_payload_entry
postcopy_payload_entry:
    mov     r13, [r15 + {steps}]
    mov     r9,  [r15 + {seed}]
    mov     rbp, [r15 + {vseed}]
    mov     r12, [r15 + {slice}]
    mov     rbx, [r15 + {slice_pages}]
    mov     r11, [r15 + {cursor}]
    mov     r10, [r15 + {lane}]
    movabs  r14, 0x9E3779B97F4A7C15

.Lpc_next:
    cmp     qword ptr [r15 + {stop_request}], 0
    jne     .Lpc_finished
    mov     rax, [r15 + {step_limit}]
    test    rax, rax
    jz      .Lpc_no_limit
    cmp     r13, rax
    jae     .Lpc_finished
.Lpc_no_limit:
    mov     rax, [r15 + {instrument_request}]
    cmp     rax, [r15 + {instrument_seen}]
    jne     .Lpc_clear_instruments

.Lpc_step:
    postcopy_now
    mov     r8, rax
    // h = mix(vseed + s * G)
    mov     rax, r13
    imul    rax, r14
    add     rax, rbp
    postcopy_mix
    mov     rdi, rax

    mov     rcx, [r15 + {pattern}]
    cmp     rcx, 0
    je      .Lpc_sequential
    cmp     rcx, 1
    je      .Lpc_strided
    cmp     rcx, 2
    je      .Lpc_random
    cmp     rcx, 3
    je      .Lpc_zipf
    cmp     rcx, 4
    je      .Lpc_hot_set
    cmp     rcx, 5
    je      .Lpc_chase
    cmp     rcx, 6
    je      .Lpc_random
    ud2

.Lpc_hot_set:
    mov     eax, r13d
    and     eax, 7
    cmp     eax, 7
    je      .Lpc_sequential
    mov     rax, rbx
    shr     rax, 4
    jnz     .Lpc_hot_set_pick
    inc     rax
.Lpc_hot_set_pick:
    mul     rdi
    mov     rsi, rdx
    jmp     .Lpc_visit

.Lpc_sequential:
    mov     rsi, r11
    inc     r11
    cmp     r11, rbx
    jb      .Lpc_visit
    xor     r11d, r11d
    jmp     .Lpc_visit

.Lpc_strided:
    mov     rsi, r11
    add     r11, 16
    cmp     r11, rbx
    jb      .Lpc_visit
    inc     r10
    cmp     r10, 16
    jb      .Lpc_next_lane
    xor     r10d, r10d
.Lpc_next_lane:
    mov     r11, r10
    jmp     .Lpc_visit

.Lpc_zipf:
    mov     rax, rdi
    shr     rax, 32
    imul    rax, rax
    shr     rax, 32
    imul    rax, rax
    shr     rax, 32
    imul    rax, rbx
    shr     rax, 32
    imul    rax, r14
    add     rax, rbp
    postcopy_mix
    mul     rbx
    mov     rsi, rdx
    jmp     .Lpc_visit

.Lpc_chase:
    mov     rsi, r11
    lea     rax, [r12 + r11]
    shl     rax, 12
    mov     rcx, [rax + {vbase} + 16]
    cmp     rcx, rbx
    jae     .Lpc_chase_failed
    mov     r11, rcx
    jmp     .Lpc_visit

.Lpc_random:
    mov     rax, rdi
    mul     rbx
    mov     rsi, rdx

.Lpc_visit:
    add     rsi, r12
    // rdx = tag = mix(seed + page * G) | 1
    mov     rax, rsi
    imul    rax, r14
    add     rax, r9
    postcopy_mix
    or      rax, 1
    mov     rdx, rax
    shl     rsi, 12
    add     rsi, {vbase}
    mov     rcx, [rsi]
    cmp     rcx, rdx
    jne     .Lpc_failed
    // rax = fill(page, 4 + s % 128)
    mov     eax, r13d
    and     eax, 127
    add     eax, 4
    imul    rax, r14
    add     rax, rdx
    postcopy_mix
    mov     ecx, r13d
    and     ecx, 127
    mov     rcx, [rsi + 8 * rcx + 32]
    cmp     rcx, rax
    jne     .Lpc_failed

    // All checks come before the first write: a step that fails leaves no trace.
    test    r13d, 63
    jnz     .Lpc_no_tail
    cmp     qword ptr [r15 + {tail_pages}], 0
    je      .Lpc_no_tail
    mov     rax, rdi
    postcopy_mix
    mul     qword ptr [r15 + {tail_pages}]
    mov     rdi, rdx
    add     rdi, [r15 + {tail}]
    shl     rdi, 12
    add     rdi, {vbase}
    mov     rcx, r13
    shr     rcx, 6
    and     ecx, 511
    mov     rcx, [rdi + 8 * rcx]
    xor     eax, eax
    test    rcx, rcx
    jnz     .Lpc_tail_failed
.Lpc_no_tail:

    test    r13, [r15 + {write_mask}]
    jnz     .Lpc_no_write
    // Word 0 was found to be the tag.
    mov     rdx, [rsi]
    mov     rax, [rsi + 8]
    movzx   ecx, al
    add     [rsi + 8 * rcx + 2048], rdx
    inc     rax
    mov     [rsi + 8], rax
.Lpc_no_write:

    postcopy_now
    mov     rcx, [r15 + {last_end}]
    mov     [r15 + {last_end}], rax
    test    rcx, rcx
    jz      .Lpc_no_gap
    mov     rdx, rax
    sub     rdx, rcx
    jb      .Lpc_no_gap
    cmp     rdx, [r15 + {max_gap}]
    jbe     .Lpc_no_gap
    mov     [r15 + {max_gap}], rdx
.Lpc_no_gap:
    sub     rax, r8
    jb      .Lpc_no_stall
    cmp     rax, [r15 + {stall_threshold}]
    jbe     .Lpc_no_stall
    inc     qword ptr [r15 + {stalls}]
    add     [r15 + {stall_sum}], rax
    mov     rdx, rax
    cmp     rax, 8
    jb      .Lpc_bucket
    bsr     rcx, rax
    lea     rdx, [8 * rcx]
    sub     ecx, 3
    shr     rax, cl
    and     eax, 7
    or      rdx, rax
.Lpc_bucket:
    inc     qword ptr [r15 + 8 * rdx + 4096]
.Lpc_no_stall:
    inc     r13
    mov     [r15 + {cursor}], r11
    mov     [r15 + {lane}], r10
    mov     [r15 + {steps}], r13

    mov     rcx, [r15 + {think}]
    test    rcx, rcx
    jz      .Lpc_next
.Lpc_think:
    postcopy_now
    sub     rax, r8
    cmp     rax, rcx
    jae     .Lpc_next
    pause
    jmp     .Lpc_think

.Lpc_clear_instruments:
    // rax holds the request throughout.
    mov     qword ptr [r15 + {max_gap}], 0
    mov     qword ptr [r15 + {stalls}], 0
    mov     qword ptr [r15 + {stall_sum}], 0
    xor     ecx, ecx
.Lpc_clear_bucket:
    mov     qword ptr [r15 + 8 * rcx + 4096], 0
    inc     ecx
    cmp     ecx, 512
    jb      .Lpc_clear_bucket
    mov     [r15 + {instrument_step}], r13
    mov     [r15 + {instrument_seen}], rax
    jmp     .Lpc_step

.Lpc_chase_failed:
    lea     rsi, [rax + {vbase}]
    lea     rax, [rbx - 1]
    jmp     .Lpc_failed
.Lpc_tail_failed:
    mov     rsi, rdi
.Lpc_failed:
    // rax expected, rcx found, rsi the address of the page.
    mov     [r15 + {failed_found}], rcx
    mov     rdi, rsi
    sub     rdi, {vbase}
    shr     rdi, 12
    mov     [r15 + {failed_page}], rdi
    mov     [r15 + {failed_expected}], rax
    mov     qword ptr [r15 + {status}], {status_failed}
    jmp     .Lpc_wait
.Lpc_finished:
    mov     qword ptr [r15 + {status}], {status_finished}
.Lpc_wait:
    // Leaves the guest; the VMM parks this vCPU until it is resumed.
    mov     dword ptr [{doorbell}], eax
    jmp     .Lpc_wait

    .globl  postcopy_payload_end
    .hidden postcopy_payload_end
postcopy_payload_end:
    .purgem postcopy_mix
    .purgem postcopy_now
    .popsection
"#,
    stub = const EXCEPTION_STUB_BYTES,
    doorbell = const DOORBELL,
    eoi = const LAPIC_EOI,
    vbase = const VBASE,
    ticks = const control::TICKS * 8,
    steps = const control::STEPS * 8,
    seed = const control::SEED * 8,
    vseed = const control::VSEED * 8,
    pattern = const control::PATTERN * 8,
    slice = const control::SLICE * 8,
    slice_pages = const control::SLICE_PAGES * 8,
    tail = const control::TAIL * 8,
    tail_pages = const control::TAIL_PAGES * 8,
    write_mask = const control::WRITE_MASK * 8,
    think = const control::THINK * 8,
    step_limit = const control::STEP_LIMIT * 8,
    stop_request = const control::STOP_REQUEST * 8,
    status = const control::STATUS * 8,
    failed_page = const control::FAILED_PAGE * 8,
    failed_expected = const control::FAILED_EXPECTED * 8,
    failed_found = const control::FAILED_FOUND * 8,
    cursor = const control::CURSOR * 8,
    lane = const control::LANE * 8,
    stall_threshold = const control::STALL_THRESHOLD * 8,
    instrument_request = const control::INSTRUMENT_REQUEST * 8,
    instrument_seen = const control::INSTRUMENT_SEEN * 8,
    instrument_step = const control::INSTRUMENT_STEP * 8,
    max_gap = const control::MAX_GAP * 8,
    last_end = const control::LAST_END * 8,
    stalls = const control::STALLS * 8,
    stall_sum = const control::STALL_SUM * 8,
    status_finished = const STATUS_FINISHED,
    status_failed = const STATUS_FAILED,
);
