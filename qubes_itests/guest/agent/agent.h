/* The guest's agent: init, agent, and the clients that talk to it, in one program. */
#ifndef AGENT_H
#define AGENT_H

/* What most files need; the others include what is theirs alone. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pwd.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#define PORT_NAME "org.qubes_itests.agent"
#define SOCKET_PATH "/run/qubes/agent.sock"
#define DB_PATH "/run/qubes/db"

enum {
	PROTOCOL_VERSION = 1,
	HEADER_SIZE = 8,
	PAYLOAD_MAX = 32760,
	WINDOW = 262144,
	STREAMS_MAX = 128, /* each way */
	TEXT_MAX = 512,
	NAME_LIMIT = 256,
	PATH_LIMIT = 1024,
};

enum frame_type {
	HELLO = 0x01, ENTER, DB_WRITE, DB_REMOVE, POWER_OFF, CLOCK, DISK, LEAVE,
	SPAWN = 0x10, CALL, DATA, END_OF_FILE, STOP, CREDIT, SIGNAL, EXIT, RESIZE,
	READY = 0x81, DONE, FAILED, LOG, DB_CHANGED,
};

enum exit_kind { EXITED, KILLED, NOT_STARTED };
enum { REFUSED = 126, NOT_FOUND = 127 };

/* The three descriptors that a client hands over with its request for a call. */
enum { FROM_CALLER, TO_CALLER, STATUS, CALL_FDS };

/* A frame's header is copied as it is: it has to lie in memory as on the wire. */
struct frame {
	uint8_t type, channel;
	uint16_t length;
	uint32_t stream;
};
_Static_assert(sizeof(struct frame) == HEADER_SIZE, "the header has holes");
_Static_assert(offsetof(struct frame, type) == 0, "the type is not first");
_Static_assert(offsetof(struct frame, channel) == 1, "the channel is misplaced");
_Static_assert(offsetof(struct frame, length) == 2, "the length is misplaced");
_Static_assert(offsetof(struct frame, stream) == 4, "the stream is misplaced");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the wire is little-endian");
_Static_assert(PAYLOAD_MAX <= UINT16_MAX, "a payload is longer than its length can tell");
_Static_assert(RESIZE == 0x18 && DB_CHANGED == 0x85, "types are not numbered as in the protocol");

/* main.c */
extern bool testing;            /* an ordinary process of the host, not init */
const char *in_root(const char *path); /* valid until the next call */
ssize_t read_file(const char *path, char *buffer, size_t size); /* and end it by NUL */
_Noreturn void die(const char *what);

/* buffer.c: bytes on their way, and NUL-ended strings in them. */
struct buffer {
	uint8_t *bytes;
	size_t size, start, end;
};
uint8_t *buffer_room(struct buffer *buffer, size_t length); /* NULL: so much is not free */
bool buffer_write(struct buffer *buffer, int fd, size_t at_once); /* false: fd is broken */

struct strings {
	const char *next, *end;
};
const char *next_string(struct strings *strings); /* NULL when there is none */

/* port.c: frames from and to the host. */
_Noreturn void run_loop(int port_fd, int disks, bool entered);
void port_flush(void);
bool port_connected(void);
bool port_room(void);        /* for one more frame of any size */
uint8_t *port_payload(void); /* where the payload of the next DATA may be put */
void send_frame(enum frame_type type, uint8_t channel, uint32_t stream,
                const void *payload, size_t length);
void send_text(enum frame_type type, const char *format, ...)
	__attribute__((format(printf, 2, 3)));

/* stream.c: commands, services and calls. */
enum { STREAM_FDS = 2 * 3 * STREAMS_MAX };
const char *stream_frame(const struct frame *frame, const uint8_t *payload);
nfds_t streams_collect(struct pollfd polled[STREAM_FDS]);
void streams_ready(const struct pollfd *polled, nfds_t count);
bool streams_sweep(void); /* false: the port is full */
void streams_reset(void);
void streams_leave(bool next_time); /* streams_reset kills no command then */
void stream_reaped(pid_t pid, int status);
const char *call_open(struct strings request, const char *user, pid_t caller,
                      const int fds[CALL_FDS]); /* NULL, or why not */
void stream_use_stdin(pid_t pid, pid_t sender, uid_t uid); /* for output, from now on */

/* terminal.c */
int terminal_open(const char *size, int *slave); /* the master, or -1 */
bool terminal_resize(int master, unsigned int columns, unsigned int rows);
bool terminal_empty(int master); /* nothing that was written is still to be read */

/* calls.c: where qrexec-client-vm asks for them. */
int calls_listen(void);
void calls_ready(int socket);
void tell_client(int status, uint8_t value, const char *text); /* and close */

/* service.c */
struct failure {
	int value;
	char text[TEXT_MAX];
};
struct service {
	enum { PROGRAM, UNIX_SERVER, TCP_SERVER } kind;
	bool bare;              /* its socket is not told who calls what */
	bool ends_with_client;  /* when that has sent EOF */
	bool ends_with_service; /* when that has */
	char path[PATH_LIMIT];
	char address[PATH_LIMIT]; /* of a TCP_SERVER */
	char user[NAME_LIMIT];    /* whom its configuration demands, or empty */
};
bool service_find(const char *name, struct service *service, struct failure *failure);
int service_connect(struct service *service, const char *name, struct failure *failure);

/* spawn.c */
extern char default_user[NAME_LIMIT];
struct passwd *find_user(const char *name, uid_t uid); /* name NULL: by uid */
bool is_empty(const char *directory); /* but for names that begin with a dot */
pid_t spawn(struct strings request, const struct service *service, const int stdio[3],
            uid_t *uid, struct failure *failure); /* service NULL: none */

/* listener.c */
#define USE_STDIN "use-stdin"
#define RUNTIME_DIRECTORY "runtime-directory"
void tell_agent(const char *socket_path, const char *what, pid_t pid);
pid_t listener_of(const struct passwd *user); /* 0 or less: there is none */
void listener_reaped(pid_t pid);
void listeners_end(void);

/* boot.c, enter.c, disks.c: the duties of init. */
int boot(void);   /* stage one; the port */
int resume(void); /* as a service of another init, which waits; the port */
const char *enter(struct strings request); /* stage two; NULL, or what went wrong */
extern bool under_systemd;   /* it runs, and has waited for stage two */
extern bool session_awaited; /* stage two is done but for what systemd starts */
extern int session_events;   /* what tells that it has come so far; or -1 */
void session_open(void);
void session_changed(void); /* it may have: then the host has its answer now */
void session_overdue(void); /* that takes too long: it has it without */
_Noreturn void run_user_manager(void); /* become the systemd of the user's session */
void make_runtime(void); /* what systemd does at boot */
bool make_runtime_directory(const struct passwd *user); /* of his session */
const char *set_clock(uint64_t nanoseconds); /* likewise */
bool mount_kernel(const char *type, const char *path, const char *options);
_Noreturn void power_off(bool reboot_instead);
int disks_open(void); /* the socket that tells of changes */
void disks_ready(void);
void disks_settle(void); /* what commands have done so far is seen, and told */
bool disk_is_ours(const char *disk); /* the host has plugged it in */
bool disk_wait(const char *path, int milliseconds);
uint64_t disk_size(int fd); /* bytes, as it is now; and so whether it can be written */
const char *disk_check(const char *name, const char *state); /* NULL: it is so */

/* blocks.c: devices that other VMs may have. */
void blocks_update(void); /* tell of them in the database, and the host */
void blocks_tell_again(void); /* of all of them: to another host */
int blocks_mounts(void);  /* what tells, by POLLPRI, that mounts have changed; or -1 */

/* nbd.c */
#define SERVE_BLOCK "serve-block"
int nbd_main(const char *mode, const char *path);

/* qubesdb.c */
bool db_set(const char *path, const char *value); /* value NULL: remove */
int qubesdb_main(int argc, char **argv, const char *command);

/* network.c */
int network_main(int argc, char **argv);

/* client.c */
int client_main(int argc, char **argv);

#endif
