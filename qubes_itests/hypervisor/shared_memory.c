/* Loaded into the QEMU of a clone, by LD_PRELOAD: its memory is a private mapping of a file
 * that many clones share, and which must never change.
 *
 * QEMU opens such a file for writing, and when the guest gives memory back (its balloon,
 * its reports of free pages) it punches a hole into the file, not only into its mapping:
 * all other clones would find zeros there. Here such a file is opened for reading, so that
 * the kernel refuses whatever would write to it. Punching then succeeds without doing
 * anything: QEMU goes on to drop its own copies of the pages, which frees their memory.
 *
 * QEMU also asks for huge pages for whatever it maps. Each touched one takes 2 MiB. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdarg.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* What a file's path begins with to be one of those. There is no such directory: without
 * this library QEMU does not start, in place of writing to the file. */
#define PREFIX "/proc/qubes_itests/read-only"

int open64(const char *path, int flags, ...)
{
	va_list arguments;
	mode_t mode;

	if (strncmp(path, PREFIX "/", sizeof PREFIX) == 0) {
		path += sizeof PREFIX - 1;
		flags = O_RDONLY | O_CLOEXEC;
	}
	va_start(arguments, flags);
	mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(arguments, mode_t) : 0;
	va_end(arguments);
	return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

int __open64_2(const char *path, int flags);

int __open64_2(const char *path, int flags)
{
	return open64(path, flags);
}

int fallocate64(int fd, int mode, off64_t offset, off64_t length)
{
	if (mode & FALLOC_FL_PUNCH_HOLE && (fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDONLY)
		return 0;
	return (int)syscall(SYS_fallocate, fd, mode, offset, length);
}

/* What an idle guest fills with code that QEMU has translated. Less than that is such as
 * its ACPI tables: 128 KiB in a mapping of 2 MiB, all of which they would take. */
#define FILLED (16 << 20)

int madvise(void *address, size_t length, int advice)
{
	if (advice == MADV_HUGEPAGE) {
		if (length < FILLED)
			return 0;
		length = FILLED;
	}
	return (int)syscall(SYS_madvise, address, length, advice);
}
