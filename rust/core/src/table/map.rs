//! The bytes of a file: mapped, with a guard against files that are cut while mapped, or read into memory.
//!
//! Reading a mapped page that the file no longer has raises SIGBUS, which ends the process. The guard turns this
//! into a flag: its handler looks the address up among the mapped ranges of this module, puts zero pages there and
//! marks the mapping as damaged, which lookups then report. Any other SIGBUS goes to the handler that stood before.

use crate::error::{Error, Result};
use crate::tensor::Bytes;
use memmap2::{MmapMut, MmapOptions};
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::path::Path;

/// How the bytes of a file come into memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Mapped: pages are read when touched, and shared between processes.
    #[default]
    Mmap,
    /// Read whole into memory: for filesystems without mapping, or files that others may cut or overwrite.
    Read,
}

/// Bytes that are read between two looks at how far a file reaches.
const CHUNK: usize = 1 << 20;

/// All bytes of a file, aligned to a page.
pub struct Mapping {
    // Stands before `map`, so that the range leaves the registry before it is unmapped.
    guard: Option<guard::Range>,
    map: MmapMut,
    mapped: bool,
}

impl Mapping {
    /// Opens a file that is not empty. A mapping that the guard has no room for is read into memory instead.
    pub fn open(path: &Path, mode: Mode) -> Result<Self> {
        let (mut file, len) = open(path)?;
        if mode == Mode::Mmap {
            let mapping = retried(|| Self::mapped(&file, len));
            let mapping = mapping.map_err(|e| Error::system(path, e, "it cannot be mapped: use mode=\"read\""))?;
            if let Some(mapping) = mapping {
                return Ok(mapping);
            }
        }
        Self::read(&mut file, len, path)
    }

    /// True if pages come from the file, false if the file was read into memory.
    pub fn is_mapped(&self) -> bool {
        self.mapped
    }

    /// Private and copy-on-write: whoever writes to these bytes writes to copies of its own.
    fn mapped(file: &File, len: usize) -> io::Result<Option<Self>> {
        // SAFETY: mapped bytes can change when another process writes to the file, which no program can exclude. Our
        // writers never do: they replace files. Bytes are plain data, so a change yields wrong values, which checksums
        // find, and never an invalid one; a file that is cut yields zeros by means of the guard.
        let map = unsafe { MmapOptions::new().len(len).no_reserve_swap().map_copy(file)? };
        Ok(guard::Range::register(&map).map(|guard| Mapping { guard, map, mapped: true }))
    }

    fn read(file: &mut File, len: usize, path: &Path) -> Result<Self> {
        // Anonymous pages are aligned and come as they are touched, so that a wrong length costs no memory.
        let mut map = MmapOptions::new().len(len).map_anon().map_err(|e| Error::io(path, e))?;
        let mut done = 0;
        while done < len {
            let end = len.min(done + CHUNK);
            match file.read(&mut map[done..end]) {
                Ok(0) => return Err(changed(path, done, len)),
                Ok(more) => done += more,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::io(path, e)),
            }
        }
        match retried(|| file.read(&mut [0])).map_err(|e| Error::io(path, e))? {
            0 => Ok(Mapping { guard: None, map, mapped: false }),
            more => Err(changed(path, len + more, len)),
        }
    }

    /// Asks the system to map the pages of a range at once, which is several times faster than one fault a page.
    pub fn prefetch(&self, range: Range<usize>) {
        // A hint: where the system refuses it, pages come one by one.
        #[cfg(target_os = "linux")]
        let _ = self.map.advise_range(memmap2::Advice::PopulateRead, range.start, range.len());
        #[cfg(not(target_os = "linux"))]
        let _ = range;
    }
}

impl Bytes for Mapping {
    fn bytes(&self) -> &[u8] {
        &self.map
    }

    fn damaged(&self) -> bool {
        self.guard.as_ref().is_some_and(guard::Range::damaged)
    }
}

fn open(path: &Path) -> Result<(File, usize)> {
    let io = |e| Error::io(path, e);
    // Asked by path first: opening a pipe would wait for its writer.
    let about = retried(|| std::fs::metadata(path)).map_err(io)?;
    if about.is_dir() {
        return Err(io(std::io::ErrorKind::IsADirectory.into()));
    }
    if !about.is_file() {
        return Err(Error::corrupt(path, "is not a regular file, so it cannot be a vqrs table"));
    }
    let file = File::open(path).map_err(io)?;
    let len = retried(|| file.metadata()).map_err(io)?.len();
    if len == 0 {
        return Err(Error::corrupt(path, "is empty, so it is not a vqrs table"));
    }
    // No object is larger than the largest isize, mapped files included.
    match isize::try_from(len) {
        Ok(len) => Ok((file, len as usize)),
        Err(_) => Err(Error::corrupt(path, format!("has {len} bytes, more than this system can address"))),
    }
}

/// Repeats a call that a signal interrupted.
pub fn retried<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => (),
            done => return done,
        }
    }
}

/// Closes a file and says what only closing tells: on network filesystems, that its last writes were lost.
pub fn close(file: File) -> io::Result<()> {
    #[cfg(unix)]
    {
        let descriptor = std::os::fd::IntoRawFd::into_raw_fd(file);
        // SAFETY: the descriptor was this file's alone, and nothing uses it afterwards.
        let closed = unsafe { libc::close(descriptor) } == 0;
        let error = io::Error::last_os_error();
        // Linux has closed it also when a signal came.
        if !closed && error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    #[cfg(not(unix))]
    drop(file);
    Ok(())
}

fn changed(path: &Path, found: usize, expected: usize) -> Error {
    Error::corrupt(path, format!("changed while it was read: {found} bytes, expected {expected}"))
}

/// The SIGBUS handler and the mapped ranges that it watches.
#[cfg(any(target_os = "linux", target_vendor = "apple"))]
mod guard {
    use libc::{c_int, c_void, siginfo_t};
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

    #[cfg(target_os = "linux")]
    use libc::__errno_location as errno;
    #[cfg(target_vendor = "apple")]
    use libc::__error as errno;

    const FREE: usize = 0;
    const CLAIMED: usize = 1;

    /// A place in the registry. `start` is [`FREE`], [`CLAIMED`] or the address where a range starts.
    struct Slot {
        start: AtomicUsize,
        end: AtomicUsize,
        damaged: AtomicBool,
    }

    /// Fixed and lock-free, because a signal handler may neither allocate nor wait.
    static SLOTS: [Slot; 4096] =
        [const { Slot { start: AtomicUsize::new(FREE), end: AtomicUsize::new(0), damaged: AtomicBool::new(false) } };
            4096];

    /// Bytes of a page.
    static PAGE: AtomicUsize = AtomicUsize::new(4096);

    /// The handler that stood before ours and its flags. Two stores, not one: a foreign SIGBUS in the instant between
    /// them, while the first table of a process is being opened, would be handled by the system's default.
    static PREVIOUS: AtomicUsize = AtomicUsize::new(libc::SIG_DFL);
    static PREVIOUS_FLAGS: AtomicUsize = AtomicUsize::new(0);

    /// The thread that is inside the previous handler, and the last address that one was called for. A handler that was
    /// installed over ours may lead back to ours while ours, installed again, leads to it: without these two, a fault
    /// would go around for ever.
    static CHAINING: AtomicUsize = AtomicUsize::new(0);
    static CHAINED_ADDRESS: AtomicUsize = AtomicUsize::new(0);

    /// A watched range; dropping it ends the watch.
    pub struct Range(&'static Slot);

    impl Range {
        /// Watches `bytes`; `Some(None)` where no guard is needed, `None` when the registry is full.
        pub fn register(bytes: &[u8]) -> Option<Option<Self>> {
            install();
            let claim = |slot: &&Slot| slot.start.compare_exchange(FREE, CLAIMED, SeqCst, SeqCst).is_ok();
            let slot = SLOTS.iter().find(claim)?;
            let start = bytes.as_ptr() as usize;
            slot.damaged.store(false, SeqCst);
            slot.end.store(start + bytes.len(), SeqCst);
            slot.start.store(start, SeqCst);
            Some(Some(Range(slot)))
        }

        /// True once a page of the range was missing.
        pub fn damaged(&self) -> bool {
            self.0.damaged.load(SeqCst)
        }
    }

    impl Drop for Range {
        fn drop(&mut self) {
            self.0.start.store(FREE, SeqCst);
        }
    }

    /// Makes ours the handler of SIGBUS, unless it is already.
    fn install() {
        // SAFETY: sigaction is plain data for which zeros are valid, and both calls get valid pointers. The handler
        // does only what is allowed inside one, and its type is the one that SA_SIGINFO asks for.
        unsafe {
            let mut old: libc::sigaction = std::mem::zeroed();
            let ours = on_sigbus as extern "C" fn(c_int, *mut siginfo_t, *mut c_void) as usize;
            if libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut old) != 0 || old.sa_sigaction == ours {
                return;
            }
            PAGE.store(usize::try_from(libc::sysconf(libc::_SC_PAGESIZE)).unwrap_or(4096), SeqCst);
            // Another thread may be just here: it sees the same old handler, or ours and returns above.
            PREVIOUS_FLAGS.store(old.sa_flags as usize, SeqCst);
            PREVIOUS.store(old.sa_sigaction, SeqCst);
            let mut new: libc::sigaction = std::mem::zeroed();
            new.sa_sigaction = ours;
            new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigemptyset(&mut new.sa_mask);
            libc::sigaction(libc::SIGBUS, &new, std::ptr::null_mut());
        }
    }

    extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
        // SAFETY: the system passes a valid siginfo; errno is a variable of this thread.
        let (address, fault, saved) = unsafe { ((*info).si_addr() as usize, (*info).si_code > 0, *errno()) };
        if !(fault && cover(address)) {
            chain(signal, info, context, fault.then_some(address));
        }
        // SAFETY: as above. The interrupted code must not see that we called the system.
        unsafe { *errno() = saved };
    }

    /// Puts zero pages at `address`, if it lies in a watched range.
    fn cover(address: usize) -> bool {
        let Some((slot, end)) = SLOTS.iter().find_map(|slot| {
            let (start, end) = (slot.start.load(SeqCst), slot.end.load(SeqCst));
            // Looked at twice: the slot may have been given to another range between the two loads.
            let inside = start > CLAIMED && (start..end).contains(&address) && slot.start.load(SeqCst) == start;
            inside.then_some((slot, end))
        }) else {
            return false;
        };
        // Before the pages, so that whoever reads zeros finds the flag raised.
        slot.damaged.store(true, SeqCst);
        let page = address & !(PAGE.load(SeqCst) - 1);
        // A cut file misses every page from here on. One range of zeros for all of them keeps the number of mappings
        // small, which the system limits; the single page is for systems that do not give so much at once.
        put_zeros(page, end - page) || put_zeros(page, PAGE.load(SeqCst).min(end - page))
    }

    fn put_zeros(page: usize, len: usize) -> bool {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANON | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the pages belong to a watched range, which is mapped (its owner is reading it just now, and leaves
        // the registry before it unmaps) with the same rights, so that nothing else is replaced.
        let at = unsafe { libc::mmap(page as *mut c_void, len, access, flags, -1, 0) };
        at != libc::MAP_FAILED
    }

    /// Hands a signal that is not ours to the handler that stood before. `fault`: where, unless somebody sent it.
    fn chain(signal: c_int, info: *mut siginfo_t, context: *mut c_void, fault: Option<usize>) {
        // SAFETY: takes no arguments and cannot fail.
        let thread = unsafe { libc::pthread_self() } as usize;
        // A handler that mended the fault is not called for the same address again.
        let again = fault.is_some_and(|address| CHAINED_ADDRESS.swap(address, SeqCst) == address);
        let circle = again || CHAINING.load(SeqCst) == thread;
        let previous = if circle { libc::SIG_DFL } else { PREVIOUS.load(SeqCst) };
        if previous == libc::SIG_IGN && fault.is_none() {
            return;
        }
        if previous == libc::SIG_DFL || previous == libc::SIG_IGN {
            return default(signal, fault.is_some());
        }
        CHAINING.store(thread, SeqCst);
        // SAFETY: the value was a handler of SIGBUS when ours replaced it, and its flags say which type it has.
        unsafe {
            if PREVIOUS_FLAGS.load(SeqCst) & libc::SA_SIGINFO as usize != 0 {
                let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) = std::mem::transmute(previous);
                handler(signal, info, context);
            } else {
                let handler: extern "C" fn(c_int) = std::mem::transmute(previous);
                handler(signal);
            }
        }
        // One that raised the signal again wants it to go on: it comes when we return, and is then not its own again.
        if !pending(signal) {
            CHAINING.store(0, SeqCst);
        }
    }

    fn pending(signal: c_int) -> bool {
        // SAFETY: zeros are a valid set, both calls get a valid pointer and are allowed in a handler.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigpending(&mut set) == 0 && libc::sigismember(&set, signal) == 1
        }
    }

    /// What the system does by default, which is to end the process.
    fn default(signal: c_int, fault: bool) {
        // SAFETY: both calls are allowed in a handler.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            // A fault comes again on return, now without a handler; a signal that somebody sent must be sent again.
            if !fault {
                libc::raise(signal);
            }
        }
    }
}

/// Windows refuses to cut a file that is mapped.
#[cfg(windows)]
mod guard {
    /// Never made: there is nothing to watch.
    pub enum Range {}

    impl Range {
        /// `Some(None)`: no guard is needed.
        pub fn register(_: &[u8]) -> Option<Option<Self>> {
            Some(None)
        }

        /// Never called.
        pub fn damaged(&self) -> bool {
            match *self {}
        }
    }
}

/// Systems for which no guard was written: files are read into memory.
#[cfg(not(any(target_os = "linux", target_vendor = "apple", windows)))]
mod guard {
    /// Never made.
    pub enum Range {}

    impl Range {
        /// `None`: the mapping cannot be watched.
        pub fn register(_: &[u8]) -> Option<Option<Self>> {
            None
        }

        /// Never called.
        pub fn damaged(&self) -> bool {
            match *self {}
        }
    }
}

/// Signals end processes, so each case runs in a child: this test program again, told by a variable what to do.
#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use libc::{c_int, c_void, siginfo_t};
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, ExitStatus};
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    const CASE: &str = "VQRS_TEST_SIGBUS_CASE";

    fn child(case: &str) -> ExitStatus {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "table::map::tests::in_a_child", "--test-threads=1"]).env(CASE, case);
        command.output().unwrap().status
    }

    fn file_of(len: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        file
    }

    /// Reads a page that is gone, of a mapping that the guard does not know.
    fn foreign_fault() {
        let file = file_of(8192);
        // SAFETY: the bytes are read once, to see the fault.
        let map = unsafe { memmap2::Mmap::map(file.as_file()).unwrap() };
        file.as_file().set_len(0).unwrap();
        assert_eq!(std::hint::black_box(&map)[5000], 0, "not reached");
    }

    type Handler = extern "C" fn(c_int, *mut siginfo_t, *mut c_void);

    fn replace(handler: usize, flags: c_int) -> libc::sigaction {
        // SAFETY: zeros are a valid sigaction; the handlers below have the type that the flags ask for.
        unsafe {
            let (mut new, mut old): (libc::sigaction, libc::sigaction) = (std::mem::zeroed(), std::mem::zeroed());
            new.sa_sigaction = handler;
            new.sa_flags = flags;
            assert_eq!(libc::sigaction(libc::SIGBUS, &new, &mut old), 0);
            old
        }
    }

    extern "C" fn exit_plain(_: c_int) {
        // SAFETY: allowed in a handler.
        unsafe { libc::_exit(42) }
    }

    extern "C" fn exit_info(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
        // SAFETY: the system passed this siginfo to our handler, which passed it on.
        unsafe { libc::_exit(if (*info).si_addr().is_null() { 1 } else { 43 }) }
    }

    static BEFORE: AtomicUsize = AtomicUsize::new(0);

    /// As Python's faulthandler: puts back what stood before it and raises the signal again.
    extern "C" fn back_and_raise(signal: c_int) {
        replace(BEFORE.load(SeqCst), libc::SA_SIGINFO);
        // SAFETY: allowed in a handler.
        unsafe { libc::raise(signal) };
    }

    /// As the handler of Rust's own runtime: puts back what stood before it, so that the fault comes again.
    extern "C" fn back(_: c_int) {
        replace(BEFORE.load(SeqCst), libc::SA_SIGINFO);
    }

    /// Installs `handler` over ours, then ours over it, so that each leads to the other.
    fn circle(handler: extern "C" fn(c_int), open: impl Fn() -> Mapping) {
        drop(open());
        BEFORE.store(replace(handler as usize, libc::SA_NODEFER).sa_sigaction, SeqCst);
        drop(open());
    }

    #[test]
    fn in_a_child() {
        let Ok(case) = std::env::var(CASE) else { return };
        let file = file_of(1 << 20);
        let guarded = || Mapping::open(file.path(), Mode::Mmap).unwrap();
        match case.as_str() {
            "default" => drop(guarded()),
            "sent" => {
                let _kept = guarded();
                // SAFETY: ends this process, which is the point.
                unsafe { libc::raise(libc::SIGBUS) };
            }
            "ignored" => {
                replace(libc::SIG_IGN, 0);
                let _kept = guarded();
                // SAFETY: ignored.
                unsafe { libc::raise(libc::SIGBUS) };
                std::process::exit(44);
            }
            "plain" => {
                replace(exit_plain as extern "C" fn(c_int) as usize, 0);
                drop(guarded());
            }
            "info" => {
                replace(exit_info as Handler as usize, libc::SA_SIGINFO);
                drop(guarded());
            }
            "circle" => circle(back, guarded),
            "raising circle" => circle(back_and_raise, guarded),
            "replaced" => {
                let early = guarded();
                replace(exit_plain as extern "C" fn(c_int) as usize, 0);
                drop(guarded());
                file.as_file().set_len(4096).unwrap();
                assert_eq!(early.bytes().iter().map(|b| u64::from(*b)).sum::<u64>(), 0);
                std::process::exit(if early.damaged() { 45 } else { 1 });
            }
            _ => full(&file),
        }
        foreign_fault();
    }

    /// More mappings than the registry holds: the later ones are copies, which a cut does not reach.
    fn full(file: &tempfile::NamedTempFile) {
        file.as_file().set_len(8192).unwrap();
        let mut all: Vec<_> = (0..4097).map(|_| Mapping::open(file.path(), Mode::Mmap).unwrap()).collect();
        file.as_file().set_len(1).unwrap();
        let read = |m: &Mapping| m.bytes()[8191] == 0;
        assert!(all.iter().all(read));
        assert!(all[..4096].iter().all(Bytes::damaged) && !all[4096].damaged());
        all.truncate(2);
        file.as_file().set_len(8192).unwrap();
        let again = Mapping::open(file.path(), Mode::Mmap).unwrap();
        assert!(again.guard.is_some() && !again.damaged());
        std::process::exit(46);
    }

    #[test]
    fn other_faults_end_where_they_would_have() {
        for case in ["default", "sent", "circle", "raising circle"] {
            assert_eq!(child(case).signal(), Some(libc::SIGBUS), "{case}");
        }
        for (case, code) in [("plain", 42), ("info", 43), ("ignored", 44), ("replaced", 45), ("full", 46)] {
            assert_eq!(child(case).code(), Some(code), "{case}");
        }
    }

    #[test]
    fn damage_is_one_mapping_s_own() {
        let (file, other) = (file_of(1 << 20), file_of(1 << 20));
        let open = |file: &tempfile::NamedTempFile| Mapping::open(file.path(), Mode::Mmap).unwrap();
        let (cut, sound, twin) = (open(&file), open(&other), open(&file));
        file.as_file().set_len(10_000).unwrap();
        assert_eq!(cut.bytes()[1 << 19], 0);
        assert!(cut.damaged() && !sound.damaged() && !twin.damaged());
        assert_eq!(twin.bytes()[(1 << 20) - 1], 0);
        assert!(twin.damaged());
    }
}
