//! Memory behind which there is nothing, for tests: while a [`Fence`] stands, whatever its thread allocates ends at the
//! end of a page that no page follows, and freed memory is never given out again. A kernel that reads or writes past a
//! slice, or one that is gone, ends the test program, on any machine and without a tool.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ffi::c_void;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::OnceLock;

/// Addresses that are set apart; those of one test are far fewer.
const REGION: usize = 1 << 36;

/// Where the next allocation goes, counted from the start of the region.
static NEXT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static FENCES: Cell<usize> = const { Cell::new(0) };
}

/// Fences allocations of this thread until it is dropped. Not with `VQRS_TEST_FENCE=0`: tools that watch each access know
/// the system's allocator, and not this one.
pub(crate) struct Fence(PhantomData<*const ()>);

impl Fence {
    pub(crate) fn new() -> Self {
        let off = std::env::var("VQRS_TEST_FENCE").is_ok_and(|value| value == "0");
        FENCES.set(if off { 0 } else { FENCES.get() + 1 });
        Fence(PhantomData)
    }
}

impl Drop for Fence {
    fn drop(&mut self) {
        FENCES.set(FENCES.get().saturating_sub(1));
    }
}

fn page() -> usize {
    static PAGE: OnceLock<usize> = OnceLock::new();
    // SAFETY: takes no pointer.
    *PAGE.get_or_init(|| unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize)
}

/// Fresh pages that may be read and written, or not, at a free place or over older ones; null where there are none.
fn map(at: *mut c_void, len: usize, access: i32) -> *mut c_void {
    let over = if at.is_null() { 0 } else { libc::MAP_FIXED };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | over;
    // SAFETY: replaces nothing but pages of the region, which only this file knows.
    let found = unsafe { libc::mmap(at, len, access, flags, -1, 0) };
    if found == libc::MAP_FAILED {
        return std::ptr::null_mut();
    }
    found
}

/// Address of the region; 0 where the system does not give so many.
fn region() -> usize {
    static START: OnceLock<usize> = OnceLock::new();
    *START.get_or_init(|| map(std::ptr::null_mut(), REGION, libc::PROT_NONE) as usize)
}

fn inside(pointer: *mut u8) -> bool {
    NEXT.load(Relaxed) > 0 && (region()..region() + REGION).contains(&(pointer as usize))
}

struct Fenced;

// SAFETY: an allocation is either the system's, or whole pages of the region that no other allocation ever had, of which
// it takes the last bytes: they are as many as asked for, and aligned, as `align_down` only moves the start down. Pages
// have no other owner, so they go when it is freed. None of this allocates or panics.
unsafe impl GlobalAlloc for Fenced {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if FENCES.try_with(Cell::get).unwrap_or(0) == 0
            || layout.size() == 0
            || layout.align() > page()
            || region() == 0
        {
            // SAFETY: passed on from the caller.
            return unsafe { System.alloc(layout) };
        }
        let len = layout.size().next_multiple_of(page());
        // A page in front and, with the next allocation or the region's end, one behind.
        let start = NEXT.fetch_add(len + page(), Relaxed) + page();
        if start + len + page() > REGION
            || map((region() + start) as *mut c_void, len, libc::PROT_READ | libc::PROT_WRITE).is_null()
        {
            return std::ptr::null_mut();
        }
        let align_down = (region() + start + len - layout.size()) & !(layout.align() - 1);
        align_down as *mut u8
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if FENCES.try_with(Cell::get).unwrap_or(0) == 0 {
            // SAFETY: passed on from the caller.
            return unsafe { System.alloc_zeroed(layout) };
        }
        // SAFETY: passed on from the caller; fresh pages are zeros, and so made are the few bytes of the system's.
        unsafe {
            let pointer = self.alloc(layout);
            if !pointer.is_null() && !inside(pointer) {
                pointer.write_bytes(0, layout.size());
            }
            pointer
        }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        if !inside(pointer) {
            // SAFETY: passed on from the caller; it came from the system.
            return unsafe { System.dealloc(pointer, layout) };
        }
        let start = pointer as usize & !(page() - 1);
        map(start as *mut c_void, layout.size().next_multiple_of(page()), libc::PROT_NONE);
    }
}

#[global_allocator]
static ALLOCATOR: Fenced = Fenced;

#[test]
fn a_read_past_the_end_ends_the_program() {
    use std::os::unix::process::ExitStatusExt;
    const CASE: &str = "VQRS_TEST_FENCE_CASE";
    if let Ok(case) = std::env::var(CASE) {
        std::env::remove_var("VQRS_TEST_FENCE");
        let _fence = Fence::new();
        let bytes = vec![1u8; 4099].into_boxed_slice();
        let pointer = bytes.as_ptr();
        if case == "freed" {
            drop(bytes);
        }
        // SAFETY: no memory is there, which ends this child: the point of the test. "whole" reads the last byte.
        let found = unsafe { pointer.add(if case == "past" { 4099 } else { 4098 }).read_volatile() };
        std::process::exit(i32::from(found) + 41);
    }
    for (case, signal, code) in
        [("past", Some(libc::SIGSEGV), None), ("freed", Some(libc::SIGSEGV), None), ("whole", None, Some(42))]
    {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "kernels::fence::a_read_past_the_end_ends_the_program", "--test-threads=1"]);
        let status = child.env(CASE, case).output().unwrap().status;
        assert_eq!((status.signal(), status.code()), (signal, code), "{case}");
    }
}
