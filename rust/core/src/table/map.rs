//! The bytes of a file: mapped, with a guard against files that are cut while mapped, or read into memory.
//!
//! Reading a mapped page that the file no longer has raises SIGBUS, which ends the process. The guard turns this
//! into a flag: its handler looks the address up among the mapped ranges of this module, puts zero pages there and
//! marks the mapping as damaged, which lookups then report. Any other SIGBUS goes to the handler that stood before.
//! Handlers that others install later stand over ours, so each call that reads looks whether it still comes first.

use crate::error::{Error, Result};
use crate::pool::Context;
use crate::tensor::Bytes;
use memmap2::{MmapMut, MmapOptions};
use std::fs::File;
use std::io::{self, Read, Seek};
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
        let mut source = Source::open(path)?;
        match source.map(mode)? {
            Some(mapping) => Ok(mapping),
            None => source.read(&[], &Context::default()),
        }
    }

    /// True if pages come from the file, false if the file was read into memory.
    pub fn is_mapped(&self) -> bool {
        self.mapped
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

    fn watch(&self) {
        if self.guard.is_some() {
            guard::watch();
        }
    }

    fn damaged(&self) -> bool {
        self.guard.as_ref().is_some_and(guard::Range::damaged)
    }
}

/// The mapped file, if it is one, that bytes belong to which somebody else keeps.
pub struct Watched(Option<guard::Watched>);

impl Watched {
    /// Of the bytes at an address.
    pub fn at(address: usize) -> Self {
        Watched(guard::Watched::find(address))
    }

    /// As [`Bytes::watch`].
    pub fn watch(&self) {
        if self.0.is_some() {
            guard::watch();
        }
    }

    /// As [`Bytes::damaged`].
    pub fn damaged(&self) -> bool {
        self.0.as_ref().is_some_and(guard::Watched::damaged)
    }
}

/// Lets forked children know that they are: to be called once, early. Opening a file does it too.
pub fn watch_forks() {
    guard::watch_forks();
}

/// An open file whose bytes are not in memory yet.
pub struct Source<'a> {
    file: File,
    len: usize,
    path: &'a Path,
}

impl<'a> Source<'a> {
    /// Opens a file that is not empty.
    pub fn open(path: &'a Path) -> Result<Self> {
        let io = |e| Error::io(path, e);
        // Asked by path first: opening a pipe would wait for its writer.
        let about = retried(|| std::fs::metadata(path)).map_err(io)?;
        if about.is_dir() {
            return Err(io(std::io::ErrorKind::IsADirectory.into()));
        }
        if !about.is_file() {
            return Err(Error::corrupt(path, "is not a regular file, so it cannot be a vqrs table"));
        }
        let file = retried(|| File::open(path)).map_err(io)?;
        let len = retried(|| file.metadata()).map_err(io)?.len();
        if len == 0 {
            return Err(Error::corrupt(path, "is empty, so it is not a vqrs table"));
        }
        // No object is larger than the largest isize, mapped files included.
        match isize::try_from(len) {
            Ok(len) => Ok(Source { file, len: len as usize, path }),
            Err(_) => Err(Error::corrupt(path, format!("has {len} bytes, more than this system can address"))),
        }
    }

    /// Bytes of the file. Never zero, so there is nothing to ask whether it is empty.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The mapped file; `None` where it is to be read, or the guard has no room for it.
    pub fn map(&self, mode: Mode) -> Result<Option<Mapping>> {
        if mode == Mode::Read {
            return Ok(None);
        }
        // SAFETY: mapped bytes can change when another process writes to the file, which no program can exclude. Our
        // writers never do: they replace files. Bytes are plain data, so a change yields wrong values, which checksums
        // find, and never an invalid one; a file that is cut yields zeros by means of the guard. The mapping is private
        // and copy-on-write: whoever writes to these bytes writes to copies of its own.
        let map = retried(|| unsafe { MmapOptions::new().len(self.len).no_reserve_swap().map_copy(&self.file) });
        let map = map.map_err(|e| Error::system(self.path, e, "it cannot be mapped: use mode=\"read\""))?;
        Ok(guard::Range::register(&map).map(|guard| Mapping { guard, map, mapped: true }))
    }

    /// Refuses a file that is larger than memory: systems that promise memory which they do not have end processes
    /// that use it.
    pub fn check_memory(&self) -> Result<()> {
        match memory() {
            Some(memory) if self.len > memory => Err(self.lack()),
            _ => Ok(()),
        }
    }

    fn lack(&self) -> Error {
        Error::Memory { what: "the whole file, read by mode=\"read\" instead of being mapped,", bytes: self.len }
    }

    /// Some bytes of the file, fewer where it ends before.
    pub fn part(&mut self, start: usize, len: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(len).map_err(|_| self.lack())?;
        let mut read = || {
            retried(|| self.file.seek(io::SeekFrom::Start(start as u64)))?;
            self.file.by_ref().take(len as u64).read_to_end(&mut bytes)
        };
        read().map_err(|e| Error::io(self.path, e))?;
        Ok(bytes)
    }

    /// Reads the whole file, which must start with `start`: bytes that were looked at before.
    pub fn read(&mut self, start: &[u8], ctx: &Context) -> Result<Mapping> {
        let (len, path) = (self.len, self.path);
        let io = |e| Error::io(path, e);
        self.check_memory()?;
        // Anonymous pages are aligned and come as they are touched, so that a wrong length costs no memory.
        let mut map = MmapOptions::new().len(len).map_anon().map_err(|e| match e.kind() {
            io::ErrorKind::OutOfMemory => self.lack(),
            _ => io(e),
        })?;
        retried(|| self.file.seek(io::SeekFrom::Start(0))).map_err(io)?;
        let mut done = 0;
        while done < len {
            ctx.check()?;
            let end = len.min(done + CHUNK);
            match self.file.read(&mut map[done..end]) {
                Ok(0) => return Err(changed(path, done, len)),
                Ok(more) => done += more,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(io(e)),
            }
        }
        if !map.starts_with(start) {
            return Err(Error::corrupt(path, "changed while it was read"));
        }
        match retried(|| self.file.read(&mut [0])).map_err(io)? {
            0 => Ok(Mapping { guard: None, map, mapped: false }),
            more => Err(changed(path, len + more, len)),
        }
    }
}

/// Bytes of memory that the machine has, where it tells.
fn memory() -> Option<usize> {
    #[cfg(unix)]
    {
        // SAFETY: takes a number and returns one; -1 where the system does not know.
        let ask = |name| usize::try_from(unsafe { libc::sysconf(name) }).ok();
        ask(libc::_SC_PHYS_PAGES)?.checked_mul(ask(libc::_SC_PAGESIZE)?)
    }
    #[cfg(not(unix))]
    None
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
    use std::sync::atomic::{fence, AtomicBool, AtomicUsize, Ordering::Acquire, Ordering::Relaxed, Ordering::SeqCst};

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
        /// What the range ends with: see [`damaged`].
        last: AtomicUsize,
    }

    /// Fixed and lock-free, because a signal handler may neither allocate nor wait.
    static SLOTS: [Slot; 4096] = [const {
        Slot {
            start: AtomicUsize::new(FREE),
            end: AtomicUsize::new(0),
            damaged: AtomicBool::new(false),
            last: AtomicUsize::new(0),
        }
    }; 4096];

    /// Bytes of a page.
    static PAGE: AtomicUsize = AtomicUsize::new(4096);

    /// Handlers that stood before ours, the latest last, and how many. One that is installed over ours and keeps ours to
    /// lead back to is found here with those before it.
    static EARLIER: [AtomicUsize; 8] = [const { AtomicUsize::new(libc::SIG_DFL) }; 8];
    static EARLIER_COUNT: AtomicUsize = AtomicUsize::new(0);

    /// Held while [`EARLIER`] changes, for less than a microsecond; a forked child frees it.
    static INSTALLING: AtomicBool = AtomicBool::new(false);

    /// When [`watch`] last looked whether the handler is still ours; 0 makes it look at once.
    static LOOKED: AtomicUsize = AtomicUsize::new(0);

    /// Ticks between two looks: a look is a call of the system, which takes a fifth of the time of a lookup.
    const PERIOD: usize = 1 << 16;

    /// The last foreign fault: its thread, its address, how many of the earlier handlers had their turn at it, how often
    /// it was mended in a row, and whether the signal was raised again while a handler ran. A handler that leads back to
    /// ours, or that does nothing, would else be called for ever.
    static CHAINED_THREAD: AtomicUsize = AtomicUsize::new(0);
    static CHAINED_ADDRESS: AtomicUsize = AtomicUsize::new(0);
    static CHAINED_TURN: AtomicUsize = AtomicUsize::new(0);
    static CHAINED_MENDED: AtomicUsize = AtomicUsize::new(0);
    static CHAINED_RAISED: AtomicBool = AtomicBool::new(false);

    /// Times that a handler may mend the same address in a row.
    const MOST_MENDED: usize = 1 << 16;

    /// A watched range; dropping it ends the watch.
    pub struct Range(&'static Slot);

    impl Range {
        /// Watches `bytes`, which start on a page; `Some(None)` where no guard is needed, `None` when the registry is full.
        pub fn register(bytes: &[u8]) -> Option<Option<Self>> {
            watch_forks();
            install();
            let claim = |slot: &&Slot| slot.start.compare_exchange(FREE, CLAIMED, SeqCst, SeqCst).is_ok();
            let slot = SLOTS.iter().find(claim)?;
            let start = bytes.as_ptr() as usize;
            slot.damaged.store(false, SeqCst);
            slot.end.store(start + bytes.len(), SeqCst);
            slot.start.store(start, SeqCst);
            slot.last.store(last_word(start + bytes.len()), SeqCst);
            // Whoever opens a table while it loads may install a handler before the first lookup.
            LOOKED.store(0, Relaxed);
            Some(Some(Range(slot)))
        }

        /// True once the file was found cut.
        pub fn damaged(&self) -> bool {
            damaged(self.0)
        }

        /// True once a fault was handled here.
        #[cfg(test)]
        pub fn seen(&self) -> bool {
            self.0.damaged.load(SeqCst)
        }
    }

    impl Drop for Range {
        fn drop(&mut self) {
            self.0.start.store(FREE, SeqCst);
        }
    }

    /// A watched range that somebody else owns and keeps.
    pub struct Watched(&'static Slot);

    impl Watched {
        /// The range that holds this address.
        pub fn find(address: usize) -> Option<Self> {
            let inside = |slot: &&Slot| {
                let start = slot.start.load(SeqCst);
                start > CLAIMED && (start..slot.end.load(SeqCst)).contains(&address)
            };
            SLOTS.iter().find(inside).map(Watched)
        }

        /// As [`Range::damaged`].
        pub fn damaged(&self) -> bool {
            damaged(self.0)
        }
    }

    /// True once a page was found missing, or the file's last bytes changed. A cut takes the last page, and reading it
    /// is a fault like any other; or it clears the bytes that it took from the last page, which holds no fault. So no row
    /// that a cut has changed is taken for a sound one, though its own page may be there.
    fn damaged(slot: &Slot) -> bool {
        // What was read of the range was read before its end is.
        fence(Acquire);
        if last_word(slot.end.load(Relaxed)) != slot.last.load(Relaxed) {
            slot.damaged.store(true, SeqCst);
        }
        slot.damaged.load(SeqCst)
    }

    /// The last whole word before `end`, or the first of a range that is shorter.
    fn last_word(end: usize) -> usize {
        const WORD: usize = size_of::<usize>();
        let page = PAGE.load(Relaxed);
        let address = (end.saturating_sub(WORD) & !(WORD - 1)).max((end - 1) & !(page - 1));
        // SAFETY: the word is aligned and lies in the last page of a range that is mapped as long as it is watched; a page
        // that the file no longer has is replaced by the handler.
        unsafe { (address as *const usize).read_volatile() }
    }

    /// Makes sure that the handler is ours before mapped bytes are read: another may have been installed since.
    pub fn watch() {
        let now = ticks();
        if now.wrapping_sub(LOOKED.load(Relaxed)) > PERIOD {
            install();
            LOOKED.store(now, Relaxed);
        }
    }

    /// A clock of nanoseconds or less that is read without a call of the system.
    fn ticks() -> usize {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: every processor of this architecture has the instruction.
        let now = unsafe { std::arch::x86_64::_rdtsc() } as usize;
        #[cfg(not(target_arch = "x86_64"))]
        let now = {
            // SAFETY: the system fills a valid struct.
            let time = unsafe {
                let mut time: libc::timespec = std::mem::zeroed();
                libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time);
                time
            };
            (time.tv_sec as usize).wrapping_mul(1_000_000_000).wrapping_add(time.tv_nsec as usize)
        };
        now
    }

    /// Lets a forked child know that it is one: it looks at the handler anew and makes threads of its own.
    pub fn watch_forks() {
        static DONE: AtomicBool = AtomicBool::new(false);
        if !DONE.swap(true, SeqCst) {
            // SAFETY: the function only stores into atomics, which is allowed in a forked child.
            unsafe { libc::pthread_atfork(None, None, Some(forked)) };
        }
    }

    extern "C" fn forked() {
        INSTALLING.store(false, SeqCst);
        LOOKED.store(0, SeqCst);
        crate::pool::forked();
    }

    /// Makes ours the handler of SIGBUS, unless it is already.
    fn install() {
        let ours = on_sigbus as extern "C" fn(c_int, *mut siginfo_t, *mut c_void) as usize;
        if current().is_none_or(|handler| handler == ours) {
            return;
        }
        while INSTALLING.swap(true, SeqCst) {
            std::thread::yield_now();
        }
        if let Some(before) = current().filter(|handler| *handler != ours) {
            // Known before it is replaced, so that a fault in between finds it.
            remember(before);
            // SAFETY: sigaction is plain data for which zeros are valid, and both calls get valid pointers. The handler
            // does only what is allowed inside one, and its type is the one that SA_SIGINFO asks for.
            let old = unsafe {
                PAGE.store(usize::try_from(libc::sysconf(libc::_SC_PAGESIZE)).unwrap_or(4096), SeqCst);
                let (mut new, mut old): (libc::sigaction, libc::sigaction) = (std::mem::zeroed(), std::mem::zeroed());
                new.sa_sigaction = ours;
                new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                libc::sigemptyset(&mut new.sa_mask);
                libc::sigaction(libc::SIGBUS, &new, &mut old);
                old.sa_sigaction
            };
            if old != before && old != ours {
                remember(old);
            }
        }
        INSTALLING.store(false, SeqCst);
    }

    /// The present handler of SIGBUS.
    fn current() -> Option<usize> {
        // SAFETY: sigaction is plain data for which zeros are valid, and the call gets a valid pointer.
        unsafe {
            let mut now: libc::sigaction = std::mem::zeroed();
            (libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut now) == 0).then_some(now.sa_sigaction)
        }
    }

    /// Puts a handler behind the earlier ones, once; of too many the earliest is forgotten.
    fn remember(handler: usize) {
        let count = EARLIER_COUNT.load(SeqCst);
        let known = EARLIER[..count].iter().position(|known| known.load(SeqCst) == handler);
        let gap = known.unwrap_or(if count < EARLIER.len() { count } else { 0 });
        for at in gap + 1..count {
            EARLIER[at - 1].store(EARLIER[at].load(SeqCst), SeqCst);
        }
        let count = if gap == count { count + 1 } else { count };
        EARLIER[count - 1].store(handler, SeqCst);
        EARLIER_COUNT.store(count, SeqCst);
    }

    extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
        // SAFETY: the system passes a valid siginfo; errno is a variable of this thread.
        let (address, fault, saved) = unsafe { ((*info).si_addr() as usize, (*info).si_code > 0, *errno()) };
        let ours = if fault { cover(address) } else { raised_for_ours(info) };
        if !ours {
            chain(signal, info, context, fault.then_some(address));
        }
        // SAFETY: as above. The interrupted code must not see that we called the system.
        unsafe { *errno() = saved };
    }

    /// Puts zero pages at `address`, if it lies in a watched range.
    fn cover(address: usize) -> bool {
        let Some((slot, start, end)) = SLOTS.iter().find_map(|slot| {
            let (start, end) = (slot.start.load(SeqCst), slot.end.load(SeqCst));
            // Looked at twice: the slot may have been given to another range between the two loads.
            let inside = start > CLAIMED && (start..end).contains(&address) && slot.start.load(SeqCst) == start;
            inside.then_some((slot, start, end))
        }) else {
            return false;
        };
        // Before the pages, so that whoever reads zeros finds the flag raised.
        slot.damaged.store(true, SeqCst);
        let page = address & !(PAGE.load(SeqCst) - 1);
        // A cut file misses every page from here on. One range of zeros for all of them keeps the number of mappings
        // small, which the system limits; the single page is for systems that do not give so much at once, the whole
        // range for those that give no mapping more.
        put_zeros(page, end - page)
            || put_zeros(page, PAGE.load(SeqCst).min(end - page))
            || put_zeros(start, end - start)
    }

    fn put_zeros(page: usize, len: usize) -> bool {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANON | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the pages belong to a watched range, which is mapped (its owner is reading it just now, and leaves
        // the registry before it unmaps) with the same rights, so that nothing else is replaced.
        let at = unsafe { libc::mmap(page as *mut c_void, len, access, flags, -1, 0) };
        at != libc::MAP_FAILED
    }

    /// Whether this process sent itself the signal because of a page of ours. A handler that was installed over ours and
    /// got the fault first, as Python's faulthandler does, puts ours back and raises the signal: the fault comes again.
    fn raised_for_ours(info: *mut siginfo_t) -> bool {
        // SAFETY: a signal that was sent has a sender; the call takes no arguments and cannot fail.
        if unsafe { (*info).si_pid() != libc::getpid() } {
            return false;
        }
        let cut = |slot: &Slot| {
            let (start, end) = (slot.start.load(SeqCst), slot.end.load(SeqCst));
            start > CLAIMED && !readable((end - 1) & !(PAGE.load(SeqCst) - 1))
        };
        SLOTS.iter().any(cut)
    }

    /// Whether a word can be read at `address`; asked of the system, which reads it and then refuses to do more.
    #[cfg(target_os = "linux")]
    fn readable(address: usize) -> bool {
        let (none, word) = (std::ptr::null_mut::<c_void>(), address & !7);
        // SAFETY: no mask has this number, so that nothing is changed; an address that cannot be read is an error.
        let refused =
            unsafe { libc::syscall(libc::SYS_rt_sigprocmask, !0 as c_int, word as *const c_void, none, 8usize) };
        // SAFETY: a variable of this thread.
        refused == 0 || unsafe { *errno() } != libc::EFAULT
    }

    /// Systems that are not asked: a foreign fault counts as mended only where the next one is another.
    #[cfg(not(target_os = "linux"))]
    fn readable(address: usize) -> bool {
        let watched = SLOTS.iter().any(|slot| {
            let start = slot.start.load(SeqCst);
            start > CLAIMED && (start..slot.end.load(SeqCst)).contains(&address)
        });
        watched
    }

    /// Hands a signal that is not ours to the handler that stood before. `fault`: where, unless somebody sent it.
    fn chain(signal: c_int, info: *mut siginfo_t, context: *mut c_void, fault: Option<usize>) {
        // SAFETY: takes no arguments and cannot fail.
        let thread = unsafe { libc::pthread_self() } as usize;
        let same = CHAINED_THREAD.swap(thread, SeqCst) == thread
            && match fault {
                Some(address) => CHAINED_ADDRESS.load(SeqCst) == address,
                None => CHAINED_RAISED.load(SeqCst),
            };
        let turn = if same { CHAINED_TURN.load(SeqCst) + 1 } else { 0 };
        let earlier = EARLIER_COUNT.load(SeqCst).checked_sub(turn + 1).map(|at| EARLIER[at].load(SeqCst));
        let handler = earlier.unwrap_or(libc::SIG_DFL);
        if handler == libc::SIG_IGN && fault.is_none() {
            return;
        }
        if handler == libc::SIG_DFL || handler == libc::SIG_IGN {
            return default(signal, fault.is_some());
        }
        if !same {
            // Not known as unmended while the handler runs: it may jump away and never return.
            CHAINED_ADDRESS.store(0, SeqCst);
        }
        CHAINED_TURN.store(turn, SeqCst);
        CHAINED_RAISED.store(true, SeqCst);
        let before = Registers::of(context);
        // SAFETY: the value was a handler of SIGBUS when ours replaced it. The system calls handlers of both types with
        // these three arguments too; one that takes only the number does not look at the others.
        unsafe {
            let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) = std::mem::transmute(handler);
            handler(signal, info, context);
        }
        // One that raised the signal again wants it to go on: it comes when we return, and is then not its own again.
        CHAINED_RAISED.store(pending(signal), SeqCst);
        if let Some(address) = fault {
            // One that mended the fault, or let the thread go on elsewhere, is called again the next time.
            let mended = before != Registers::of(context) || readable(address);
            let times = if mended { CHAINED_MENDED.load(SeqCst) + 1 } else { 0 };
            CHAINED_MENDED.store(times, SeqCst);
            CHAINED_ADDRESS.store(if mended && times < MOST_MENDED { 0 } else { address }, SeqCst);
        }
    }

    /// The registers of the interrupted thread, to see whether a handler changed them.
    #[derive(PartialEq, Eq)]
    struct Registers([u64; REGISTERS]);

    #[cfg(target_os = "linux")]
    const REGISTERS: usize = size_of::<libc::mcontext_t>() / 8;
    #[cfg(not(target_os = "linux"))]
    const REGISTERS: usize = 0;

    impl Registers {
        #[cfg(target_os = "linux")]
        fn of(context: *mut c_void) -> Self {
            // SAFETY: the system passes a valid context to a handler of our type, whose registers are plain numbers.
            unsafe {
                let registers = &raw const (*context.cast::<libc::ucontext_t>()).uc_mcontext;
                Registers(registers.cast::<[u64; REGISTERS]>().read_unaligned())
            }
        }

        #[cfg(not(target_os = "linux"))]
        fn of(_: *mut c_void) -> Self {
            Registers([])
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

    /// Never made: there is nothing to watch.
    pub enum Watched {}

    impl Watched {
        /// `None`: no range is watched.
        pub fn find(_: usize) -> Option<Self> {
            None
        }

        /// Never called.
        pub fn damaged(&self) -> bool {
            match *self {}
        }
    }

    /// There is nothing to watch.
    pub fn watch() {}

    /// Processes do not fork, or threads tell them apart by their number alone.
    pub fn watch_forks() {}
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

    /// Never made: there is nothing to watch.
    pub enum Watched {}

    impl Watched {
        /// `None`: no range is watched.
        pub fn find(_: usize) -> Option<Self> {
            None
        }

        /// Never called.
        pub fn damaged(&self) -> bool {
            match *self {}
        }
    }

    /// There is nothing to watch.
    pub fn watch() {}

    /// Processes do not fork, or threads tell them apart by their number alone.
    pub fn watch_forks() {}
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

    extern "C" fn mend(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
        BEFORE.fetch_add(1, SeqCst);
        // SAFETY: puts a page where the test below has lost one.
        unsafe {
            let page = ((*info).si_addr() as usize & !4095) as *mut c_void;
            libc::mmap(page, 4096, libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_ANON | libc::MAP_FIXED, -1, 0);
        }
    }

    /// A handler that mends a fault is asked each time, at the same address too.
    fn mended(open: impl Fn() -> Mapping) {
        use std::os::fd::AsRawFd;
        replace(mend as Handler as usize, libc::SA_SIGINFO);
        let _kept = open();
        let file = file_of(4096);
        let mut at = std::ptr::null_mut();
        for turn in 0..10 {
            file.as_file().set_len(4096).unwrap();
            let fixed = if turn == 0 { 0 } else { libc::MAP_FIXED };
            // SAFETY: one page, which is this test's own; it is read once.
            unsafe {
                let descriptor = file.as_file().as_raw_fd();
                at = libc::mmap(at, 4096, libc::PROT_READ, libc::MAP_PRIVATE | fixed, descriptor, 0);
                file.as_file().set_len(0).unwrap();
                assert_eq!(at.cast::<u8>().read_volatile(), 0);
            }
        }
        std::process::exit(if BEFORE.load(SeqCst) == 10 { 47 } else { 1 });
    }

    /// A table that is cut after `handler` was installed over ours.
    fn later(handler: usize, flags: c_int, wait: bool, open: impl Fn() -> Mapping, file: &std::fs::File) {
        let table = open();
        table.watch();
        BEFORE.store(replace(handler, flags).sa_sigaction, SeqCst);
        if wait {
            std::thread::sleep(std::time::Duration::from_millis(1));
            table.watch();
        }
        file.set_len(4096).unwrap();
        assert_eq!(table.bytes()[1 << 19], 0);
        std::process::exit(if table.damaged() { 48 } else { 1 });
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
            "mended" => mended(guarded),
            "later" => later(exit_plain as extern "C" fn(c_int) as usize, 0, true, guarded, file.as_file()),
            "later, no look" => {
                later(back_and_raise as extern "C" fn(c_int) as usize, libc::SA_NODEFER, false, guarded, file.as_file())
            }
            "three" => {
                replace(exit_plain as extern "C" fn(c_int) as usize, 0);
                circle(back_and_raise, guarded);
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
        for (case, code) in [("mended", 47), ("later", 48), ("later, no look", 48), ("three", 42)] {
            assert_eq!(child(case).code(), Some(code), "{case}");
        }
    }

    /// The page of what was lost is still there, and zeros are read without a fault.
    #[test]
    fn a_cut_inside_the_last_page_is_noticed() {
        let file = file_of(0);
        let content = [7u8; 3 * 4096 + 128];
        std::fs::write(file.path(), content).unwrap();
        let mapping = Mapping::open(file.path(), Mode::Mmap).unwrap();
        assert!(!mapping.damaged());
        file.as_file().set_len(3 * 4096 + 120).unwrap();
        assert!(mapping.damaged());
        let again = Mapping::open(file.path(), Mode::Mmap).unwrap();
        file.as_file().set_len(5000).unwrap();
        assert_eq!((again.bytes()[4999], again.bytes()[5001]), (7, 0));
        file.as_file().set_len(content.len() as u64).unwrap();
        assert!(again.damaged());
    }

    #[test]
    fn short_files_are_watched_too() {
        for len in [1, 7, 8, 4095, 4096, 4097, 4100] {
            let file = file_of(len);
            let mapping = Mapping::open(file.path(), Mode::Mmap).unwrap();
            assert!(!mapping.damaged(), "{len}");
            file.as_file().set_len(0).unwrap();
            assert!(mapping.damaged(), "{len}");
        }
    }

    #[test]
    fn damage_is_one_mapping_s_own() {
        let (file, other) = (file_of(1 << 20), file_of(1 << 20));
        let open = |file: &tempfile::NamedTempFile| Mapping::open(file.path(), Mode::Mmap).unwrap();
        let (cut, sound, twin) = (open(&file), open(&other), open(&file));
        file.as_file().set_len(10_000).unwrap();
        assert_eq!(cut.bytes()[1 << 19], 0);
        let slot = |mapping: &Mapping| mapping.guard.as_ref().unwrap().seen();
        assert!(slot(&cut) && !slot(&sound) && !slot(&twin));
        // Another mapping of the file finds out when it is asked, whatever was read of it.
        assert!(cut.damaged() && !sound.damaged() && twin.damaged());
        assert_eq!(twin.bytes()[(1 << 20) - 1], 0);
    }
}
