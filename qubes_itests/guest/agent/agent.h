/* The guest's agent: init, agent, and the clients that talk to it, in one program. */
#ifndef AGENT_H
#define AGENT_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define PORT_NAME "org.qubes_itests.agent"
#define SOCKET_PATH "/run/qubes/agent.sock"
#define DB_PATH "/run/qubes/qubesdb"

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
	HELLO = 0x01, ENTER, DB_WRITE, DB_REMOVE, POWER_OFF,
	SPAWN = 0x10, CALL, DATA, END_OF_FILE, STOP, CREDIT, SIGNAL, EXIT,
	READY = 0x81, DONE, FAILED, LOG,
};

enum exit_kind { EXITED, KILLED, NOT_STARTED };
enum { REFUSED = 126, NOT_FOUND = 127 };

struct frame {
	uint8_t type, channel;
	uint16_t length;
	uint32_t stream;
};

/* The NUL-ended strings of a payload, taken one by one. */
struct strings {
	const char *next, *end;
};
const char *next_string(struct strings *strings); /* NULL when there is none */
bool strings_valid(const struct strings *strings);
ssize_t read_file(const char *path, char *buffer, size_t size); /* and end it by NUL */

/* loop.c: what the agent waits for. */
struct watch {
	int fd; /* -1: closed */
	uint32_t events;
	void (*ready)(struct watch *watch, uint32_t events);
};
#define container_of(pointer, type, member) \
	((type *)(void *)((char *)(pointer) - offsetof(type, member)))
void watch_open(struct watch *watch, int fd, uint32_t events,
                void (*ready)(struct watch *, uint32_t));
void watch_events(struct watch *watch, uint32_t events); /* 0: not even hang-ups */
void watch_close(struct watch *watch);
_Noreturn void run_loop(int port_fd);

/* port.c: frames from and to the host. */
extern bool testing;  /* an ordinary process of the host, not init */
extern bool connected; /* HELLO came */
bool port_receive(void); /* true: there may be more */
void port_flush(void);
bool port_room(void); /* for one more frame of any size */
uint8_t *port_payload(void); /* where the payload of the next DATA may be put */
void port_open(int fd);
void port_disconnected(void);
void send_frame(enum frame_type type, uint8_t channel, uint32_t stream,
                const void *payload, size_t length);
void send_exit(uint32_t stream, enum exit_kind kind, int value, const char *text);
void send_text(enum frame_type type, const char *format, ...)
	__attribute__((format(printf, 2, 3)));
_Noreturn void die(const char *what);

/* stream.c */
struct stream;
void streams_init(void);
void streams_reset(void);
const char *stream_frame(const struct frame *frame, const uint8_t *payload);
const char *stream_data(const struct frame *frame, const uint8_t *bytes, size_t length);
void stream_reaped(pid_t pid, int status);
struct stream *call_slot(void); /* NULL: all are taken */
void call_start(struct stream *stream, int control, int stdio, struct strings request,
                const char *user);

/* spawn.c */
struct user {
	uid_t uid;
	gid_t gid;
	const char *name, *home, *shell;
	char line[PATH_LIMIT];
};
struct failure {
	int value;
	char text[TEXT_MAX];
};
extern char default_user[NAME_LIMIT];
extern const char *root_prefix;
bool find_user(const char *name, uid_t uid, struct user *user); /* name NULL: by uid */
pid_t spawn(struct strings request, const int stdio[3], struct failure *failure);
const char *in_root(const char *path); /* valid until the next call */

/* calls.c */
void calls_listen(void);

/* boot.c, enter.c, disks.c: the duties of init. */
int boot(void); /* stage one; the port */
void enter(struct strings request);
_Noreturn void power_off(bool reboot_instead);
void disks_open(void);
void disks_scan(void);
bool disks_wait(int timeout_ms); /* false: nothing was plugged or pulled until then */

/* qubesdb.c */
bool db_set(const char *path, const char *value); /* value NULL: remove */
bool db_publish(void);
int qubesdb_main(int argc, char **argv, const char *command);

/* client.c */
int client_main(int argc, char **argv);

#endif
