/* A block device of this guest, served to one client over a socket: NBD, its "newstyle"
 * handshake and simple replies, as QEMU speaks it. */
#include "agent.h"

#include <endian.h>
#include <linux/fs.h>
#include <sys/ioctl.h>

enum {
	OPTION_EXPORT_NAME = 1, OPTION_ABORT = 2,
	READ = 0, WRITE = 1, DISCONNECT = 2, FLUSH = 3,
	FIXED_NEWSTYLE = 1, NO_ZEROES = 2,
	HAS_FLAGS = 1, READ_ONLY = 2, SEND_FLUSH = 4,
	LONGEST = 32 << 20, /* QEMU asks for no more at once */
};
#define MAGIC 0x4e42444d41474943ull  /* NBDMAGIC */
#define OPTION 0x49484156454f5054ull /* IHAVEOPT */
#define ANSWER 0x3e889045565a9ull
#define UNSUPPORTED 0x80000001u
#define REQUEST 0x25609513u
#define REPLY 0x67446698u

static bool take(void *data, size_t length)
{
	for (char *at = data; length > 0;) {
		ssize_t got = read(STDIN_FILENO, at, length);

		if (got <= 0)
			return false;
		at += got;
		length -= (size_t)got;
	}
	return true;
}

static bool give(const void *data, size_t length)
{
	for (const char *at = data; length > 0;) {
		ssize_t done = write(STDOUT_FILENO, at, length);

		if (done <= 0)
			return false;
		at += done;
		length -= (size_t)done;
	}
	return true;
}

/* False: the client is gone, or breaks the protocol. */
static bool negotiate(uint64_t size, bool read_only, void *space)
{
	struct __attribute__((packed)) {
		uint64_t magic, option;
		uint16_t flags;
	} hello = {htobe64(MAGIC), htobe64(OPTION), htobe16(FIXED_NEWSTYLE | NO_ZEROES)};
	struct __attribute__((packed)) {
		uint64_t magic;
		uint32_t option, length;
	} asked;
	struct __attribute__((packed)) {
		uint64_t magic;
		uint32_t option, type, length;
	} answer = {htobe64(ANSWER), 0, htobe32(UNSUPPORTED), 0};
	struct __attribute__((packed)) {
		uint64_t size;
		uint16_t flags;
		uint8_t zeroes[124];
	} export = {htobe64(size),
	            htobe16((uint16_t)(HAS_FLAGS | SEND_FLUSH | (read_only ? READ_ONLY : 0))),
	            {0}};
	uint32_t flags;

	if (!give(&hello, sizeof hello) || !take(&flags, sizeof flags))
		return false;
	while (take(&asked, sizeof asked) && be64toh(asked.magic) == OPTION) {
		uint32_t length = be32toh(asked.length), option = be32toh(asked.option);

		if (length > LONGEST || !take(space, length) || option == OPTION_ABORT)
			return false;
		if (option == OPTION_EXPORT_NAME)
			return give(&export, be32toh(flags) & NO_ZEROES
			                     ? offsetof(__typeof__(export), zeroes) : sizeof export);
		answer.option = asked.option;
		if (!give(&answer, sizeof answer))
			return false;
	}
	return false;
}

/* Read or write all of it; 0, or what went wrong. */
static int transfer(int fd, bool writing, char *data, size_t length, uint64_t offset)
{
	while (length > 0) {
		ssize_t done = writing ? pwrite(fd, data, length, (off_t)offset)
		                       : pread(fd, data, length, (off_t)offset);

		if (done <= 0)
			return done < 0 ? errno : EINVAL;
		data += done;
		length -= (size_t)done;
		offset += (uint64_t)done;
	}
	return 0;
}

/* serve-block r|w DEVICE: on standard input and output, to the end of the first. */
int nbd_main(const char *mode, const char *path)
{
	bool read_only = strcmp(mode, "w") != 0;
	int fd = open(path, (read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC);
	static char *space;
	struct __attribute__((packed)) {
		uint32_t magic;
		uint16_t flags, type;
		uint64_t handle, offset;
		uint32_t length;
	} request;
	struct __attribute__((packed)) {
		uint32_t magic, error;
		uint64_t handle;
	} reply = {htobe32(REPLY), 0, 0};
	uint64_t size = 0;

	if (fd < 0 || !(space = malloc(LONGEST)) || (size = (uint64_t)lseek(fd, 0, SEEK_END)) > INT64_MAX) {
		fprintf(stderr, "%s: %s\n", path, strerror(errno));
		return 1;
	}
	if (!negotiate(size, read_only, space))
		return 1;
	while (take(&request, sizeof request) && be32toh(request.magic) == REQUEST) {
		uint16_t type = be16toh(request.type);
		uint32_t length = be32toh(request.length);
		int error = 0;

		if (type == DISCONNECT)
			return 0;
		if (length > LONGEST || (type == WRITE && !take(space, length)))
			return 1;
		if (type == FLUSH)
			error = fdatasync(fd) == 0 ? 0 : errno;
		else if (type != READ && (type != WRITE || read_only))
			error = type == WRITE ? EPERM : EINVAL;
		else
			error = transfer(fd, type == WRITE, space, length, be64toh(request.offset));
		reply.error = htobe32((uint32_t)error);
		reply.handle = request.handle;
		if (!give(&reply, sizeof reply) ||
		    (type == READ && error == 0 && !give(space, length)))
			return 1;
	}
	return 1;
}
