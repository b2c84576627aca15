package rpc_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"math"
	"runtime"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/contrib/grpc/rpc"
	"github.com/paidonce/idempotency/contrib/grpc/rpctest/rpctestpb"
)

const method = "/paidonce.rpctest.v1.Probe/Pay"

// kinds returns a message with a field of each kind.
func kinds() *rpctestpb.Kinds {
	return &rpctestpb.Kinds{
		RequestId: "r", Bool: true, Enum: rpctestpb.Level_NEGATIVE, Int32: -1, Sint32: -2, Uint32: 3, Int64: -4, Sint64: -5, Uint64: 6,
		Fixed32: 7, Sfixed32: -8, Float: 9.5, Fixed64: 10, Sfixed64: -11, Double: math.Inf(-1), String_: "é", Bytes: []byte{0, 255},
		Message: &rpctestpb.Kinds{RequestId: "kept", Message: &rpctestpb.Kinds{}}, Packed: []int64{1, -2, 3}, Strings: []string{"b", "", "a"},
		Messages: []*rpctestpb.Kinds{{Bool: true}, {}},
		ByText:   map[string]*rpctestpb.Kinds{"b": {}, "a": {Int32: 1}, "": {}},
		ByBool:   map[bool]string{true: "t", false: "f"}, ByUint32: map[uint32]string{300: "x", 2: "y"}, BySint64: map[int64]string{-1: "x", 1: "", 0: "z"},
		Set: proto.Int32(0), One: &rpctestpb.Kinds_Number{Number: 0}, Unpacked: []float64{2, 1},
	}
}

// The fingerprint is frozen: a change turns each retry that crosses an upgrade into a mismatch.
func TestFingerprintIsFrozen(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		message proto.Message
		want    string
	}{
		"no field":   {&emptypb.Empty{}, "69251ea1835328344a533c1c783c7d9350b2a28043cda8b5da272ecc47c5ab1e"},
		"each kind":  {kinds(), "7202beab2560512efbc6b9dc4eb02cf0c8ce12380ad981310f618d347ff6ae02"},
		"a transfer": {&rpctestpb.PayRequest{RequestId: "left out", Do: "reply", Amount: 1250}, "96793bfd0bbbdd880affe49cbfa29eed96a9e00bc68f63339a34341e95541764"},
	} {
		got := rpc.Fingerprint(method, c.message, rpc.KeyFieldDefault)
		if hex.EncodeToString(got.Sum[:]) != c.want || got.Version != idempotency.FingerprintVersionRPC {
			t.Errorf("%s: version %d, %x", name, got.Version, got.Sum)
		}
	}
}

func TestFingerprintIsOfTheWholeMessage(t *testing.T) {
	t.Parallel()
	base := rpc.Fingerprint(method, kinds(), rpc.KeyFieldDefault)
	for name, change := range map[string]func(k *rpctestpb.Kinds){
		"bool": func(k *rpctestpb.Kinds) { k.Bool = false }, "enum": func(k *rpctestpb.Kinds) { k.Enum = 1 },
		"sint32": func(k *rpctestpb.Kinds) { k.Sint32 = 2 }, "fixed64": func(k *rpctestpb.Kinds) { k.Fixed64++ },
		"float": func(k *rpctestpb.Kinds) { k.Float = 9.25 }, "double": func(k *rpctestpb.Kinds) { k.Double = math.Inf(1) },
		"string": func(k *rpctestpb.Kinds) { k.String_ += "x" }, "bytes": func(k *rpctestpb.Kinds) { k.Bytes = nil },
		"request_id inside": func(k *rpctestpb.Kinds) { k.Message.RequestId = "" },
		"message":           func(k *rpctestpb.Kinds) { k.Message.Message = nil },
		"order of a list":   func(k *rpctestpb.Kinds) { k.Strings = []string{"", "b", "a"} },
		"packed":            func(k *rpctestpb.Kinds) { k.Packed = []int64{1, -2} },
		"key of a map":      func(k *rpctestpb.Kinds) { delete(k.ByText, ""); k.ByText["c"] = &rpctestpb.Kinds{} },
		"value of a map":    func(k *rpctestpb.Kinds) { k.ByBool[true] = "f" },
		"presence":          func(k *rpctestpb.Kinds) { k.Set = nil },
		"oneof":             func(k *rpctestpb.Kinds) { k.One = &rpctestpb.Kinds_Text{} },
		"unknown field": func(k *rpctestpb.Kinds) {
			k.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 99, 0), 1))
		},
	} {
		k := kinds()
		change(k)
		if rpc.Fingerprint(method, k, rpc.KeyFieldDefault).Equal(base) {
			t.Errorf("%s: a change is not noticed", name)
		}
	}
	k := kinds()
	k.RequestId = "another"
	if !rpc.Fingerprint(method, k, rpc.KeyFieldDefault).Equal(base) {
		t.Error("the key is a part of the fingerprint")
	}
	if rpc.Fingerprint(method, k, "-").Equal(base) {
		t.Error("without a field for the key request_id is not a part of the fingerprint")
	}
	for _, other := range []string{method + "s", strings.Replace(method, "Pay", "Pax", 1)} {
		if rpc.Fingerprint(other, kinds(), rpc.KeyFieldDefault).Equal(base) {
			t.Errorf("%s has the same fingerprint", other)
		}
	}
}

// A server that knows a field and one that does not make the same fingerprint, in whatever order
// the client sends the fields.
func TestFingerprintDoesNotDependOnTheProgram(t *testing.T) {
	t.Parallel()
	k := kinds()
	for _, entries := range []func(){
		func() { delete(k.ByText, ""); delete(k.ByText, "b") }, func() { delete(k.ByBool, true) },
		func() { delete(k.ByUint32, 2) }, func() { delete(k.BySint64, -1); delete(k.BySint64, 0) },
	} {
		entries() // one entry is left
	}
	k.Strings = []string{"a", "b"}
	k.Messages = k.Messages[1:]
	wire, err := proto.Marshal(k)
	if err != nil {
		t.Fatal(err)
	}
	var fields [][]byte
	for rest := wire; len(rest) > 0; {
		_, _, n := protowire.ConsumeField(rest)
		fields = append([][]byte{rest[:n]}, fields...)
		rest = rest[n:]
	}
	// Empty knows no field. Its request_id is none, so leave that out of both.
	k.RequestId = ""
	unknown := new(emptypb.Empty)
	for _, field := range fields {
		if number, _, _ := protowire.ConsumeTag(field); number != 1 {
			unknown.ProtoReflect().SetUnknown(append(unknown.ProtoReflect().GetUnknown(), field...))
		}
	}
	if !rpc.Fingerprint(method, k, rpc.KeyFieldDefault).Equal(rpc.Fingerprint(method, unknown, rpc.KeyFieldDefault)) {
		t.Error("a program that knows no field has another fingerprint")
	}
}

// A deep message costs no more than its bytes. It is not parallel to others, which also allocate.
func TestFingerprintOfADeepMessage(t *testing.T) {
	deep := structpb.NewStringValue(strings.Repeat("x", 1<<20))
	for range 5000 {
		deep = structpb.NewListValue(&structpb.ListValue{Values: []*structpb.Value{deep}})
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	rpc.Fingerprint(method, deep, "-")
	runtime.ReadMemStats(&after)
	if allocated := after.TotalAlloc - before.TotalAlloc; allocated > 64<<20 {
		t.Errorf("the fingerprint of a message of 1 MiB, 5000 deep, needs %d bytes", allocated)
	}
}

// FuzzFingerprint checks that the canonical form leaves nothing out: it is an encoding of the
// message.
func FuzzFingerprint(f *testing.F) {
	wire, err := proto.Marshal(kinds())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(wire)
	f.Add([]byte("\x0a\x01r\xf8\x07\x01"))
	f.Fuzz(func(t *testing.T, data []byte) {
		k := new(rpctestpb.Kinds)
		if proto.Unmarshal(data, k) != nil {
			t.Skip()
		}
		decoded := new(rpctestpb.Kinds)
		canonical := rpc.Canonical(k)
		if err := proto.Unmarshal(canonical, decoded); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(rpc.Canonical(decoded), canonical) {
			t.Errorf("%v\nhas another form than\n%v", k, decoded)
		}
		// proto.Equal compares unknown fields in their order, which the canonical form does not
		// keep.
		known := proto.UnmarshalOptions{DiscardUnknown: true}
		if known.Unmarshal(data, k) != nil || known.Unmarshal(canonical, decoded) != nil || !proto.Equal(k, decoded) {
			t.Errorf("%v\nis not\n%v", k, decoded)
		}
	})
}

func TestKey(t *testing.T) {
	t.Parallel()
	longest := strings.Repeat("k", idempotency.KeyBytesMax)
	for name, c := range map[string]struct {
		values []string
		field  string
		want   string
		err    error
	}{
		"none":                     {nil, "", "", rpc.ErrKeyMissing},
		"metadata":                 {[]string{"k-1"}, "", "k-1", nil},
		"quoted":                   {[]string{` "k\\1" `}, "", `k\1`, nil},
		"field":                    {nil, "k-1", "k-1", nil},
		"both":                     {[]string{"k-1"}, "k-1", "k-1", nil},
		"both, one quoted":         {[]string{`"k-1"`}, "k-1", "k-1", nil},
		"they differ":              {[]string{"k-1"}, "k-2", "", idempotency.ErrKeyInvalid},
		"two values":               {[]string{"k-1", "k-1"}, "", "", idempotency.ErrKeyInvalid},
		"empty":                    {[]string{""}, "", "", idempotency.ErrKeyInvalid},
		"empty beside the field":   {[]string{""}, "k-1", "", idempotency.ErrKeyInvalid},
		"a parameter":              {[]string{`"k-1";a=1`}, "", "", idempotency.ErrKeyInvalid},
		"the field is invalid":     {nil, "k 1", "", idempotency.ErrKeyInvalid},
		"the longest":              {[]string{longest}, "", longest, nil},
		"one character more":       {[]string{longest + "k"}, "", "", idempotency.ErrKeyInvalid},
		"one more in the field":    {nil, longest + "k", "", idempotency.ErrKeyInvalid},
		"the field is not trimmed": {nil, " k-1", "", idempotency.ErrKeyInvalid},
	} {
		got, err := rpc.Key(c.values, &rpctestpb.PayRequest{RequestId: c.field}, rpc.KeyFieldDefault)
		if !errors.Is(err, c.err) || err == nil && got != c.want {
			t.Errorf("%s: %q, %v; want %q, %v", name, got, err, c.want, c.err)
		}
		if err != nil && strings.Contains(err.Error(), "k-") {
			t.Errorf("%s: the error shows the key: %v", name, err)
		}
	}
	for _, field := range []protoreflect.Name{"amount", "absent", "-"} { // no string, no field, none
		if _, err := rpc.Key(nil, &rpctestpb.PayRequest{RequestId: "k-1", Amount: 1}, field); !errors.Is(err, rpc.ErrKeyMissing) {
			t.Errorf("field %s: %v", field, err)
		}
	}
}

func TestResultsAreRecorded(t *testing.T) {
	t.Parallel()
	detail, err := anypb.New(&errdetails.ErrorInfo{Reason: "NO_MONEY"})
	if err != nil {
		t.Fatal(err)
	}
	unknown := &anypb.Any{TypeUrl: "type.googleapis.com/absent.Type", Value: []byte("abc")}
	for _, want := range []rpc.Result{
		{Reply: &rpctestpb.PayReply{Id: "1"}},
		{Reply: &rpctestpb.PayReply{}},
		{Reply: &emptypb.Empty{}},
		{Error: &status.Status{Code: int32(code.Code_NOT_FOUND), Message: "no such account", Details: []*anypb.Any{detail, unknown}}},
		{Error: &status.Status{Code: 77}},
	} {
		answer, err := rpc.Encode(want)
		if err != nil {
			t.Fatal(err)
		}
		if err := answer.Validate(); err != nil || rpc.CodeOf(answer) != want.Code() || answer.Status != rpc.HTTPStatus(want.Code()) {
			t.Errorf("status %d, code %v, %v", answer.Status, rpc.CodeOf(answer), err)
		}
		got, err := rpc.Decode(answer)
		if err != nil || !proto.Equal(got.Error, want.Error) || want.Reply != nil && !proto.Equal(got.Reply, want.Reply) {
			t.Errorf("%v became %v, %v", want, got, err)
		}
	}
	// A reply of a type that this program does not have is no sign of a changed record.
	answer, err := rpc.Encode(rpc.Result{Reply: &rpctestpb.PayReply{}})
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := proto.Marshal(&status.Status{Details: []*anypb.Any{unknown}})
	if err != nil {
		t.Fatal(err)
	}
	two, err := proto.Marshal(&status.Status{Details: []*anypb.Any{detail, detail}})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		answer  idempotency.Answer
		corrupt bool
	}{
		"unknown type":  {idempotency.Answer{Status: 200, Header: answer.Header, Body: foreign}, false},
		"HTTP":          {idempotency.Answer{Status: 200, Header: map[string][]string{"Content-Type": {"application/json"}}, Body: answer.Body}, true},
		"no header":     {idempotency.Answer{Status: 200, Body: answer.Body}, true},
		"no reply":      {idempotency.Answer{Status: 200, Header: answer.Header}, true},
		"two replies":   {idempotency.Answer{Status: 200, Header: answer.Header, Body: two}, true},
		"broken status": {idempotency.Answer{Status: 404, Header: answer.Header, Body: []byte{0xff}}, true},
	} {
		if _, err := rpc.Decode(&c.answer); err == nil || errors.Is(err, idempotency.ErrRecordCorrupt) != c.corrupt {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestEachCodeHasAMeaning(t *testing.T) {
	t.Parallel()
	const commit, decline, forget = idempotency.DispositionCommit, idempotency.DispositionDecline, idempotency.DispositionForget
	for c, want := range map[code.Code]struct {
		status      int
		disposition idempotency.Disposition
	}{
		code.Code_OK: {200, commit}, code.Code_CANCELLED: {499, forget}, code.Code_UNKNOWN: {500, forget},
		code.Code_INVALID_ARGUMENT: {400, decline}, code.Code_DEADLINE_EXCEEDED: {504, forget}, code.Code_NOT_FOUND: {404, decline},
		code.Code_ALREADY_EXISTS: {409, decline}, code.Code_PERMISSION_DENIED: {403, forget}, code.Code_UNAUTHENTICATED: {401, forget},
		code.Code_RESOURCE_EXHAUSTED: {429, forget}, code.Code_FAILED_PRECONDITION: {400, decline}, code.Code_ABORTED: {409, forget},
		code.Code_OUT_OF_RANGE: {400, decline}, code.Code_UNIMPLEMENTED: {501, forget}, code.Code_INTERNAL: {500, forget},
		code.Code_UNAVAILABLE: {503, forget}, code.Code_DATA_LOSS: {500, forget}, 77: {500, forget},
	} {
		if got := rpc.HTTPStatus(c); got != want.status {
			t.Errorf("%v: status %d, want %d", c, got, want.status)
		}
		if got := rpc.DefaultDisposition(c); got != want.disposition {
			t.Errorf("%v: disposition %d, want %d", c, got, want.disposition)
		}
	}
}

// No code of an unknown outcome may mean a definite failure, and each reason has a text.
func TestRefusals(t *testing.T) {
	t.Parallel()
	for reason, c := range map[idempotency.Reason]struct {
		outcome idempotency.Outcome
		code    code.Code
		retry   bool
	}{
		idempotency.ReasonKeyMissing:      {idempotency.OutcomeNotExecuted, code.Code_INVALID_ARGUMENT, false},
		idempotency.ReasonKeyInvalid:      {idempotency.OutcomeNotExecuted, code.Code_INVALID_ARGUMENT, false},
		idempotency.ReasonScope:           {idempotency.OutcomeNotExecuted, code.Code_UNAUTHENTICATED, false},
		idempotency.ReasonBodyTooLarge:    {idempotency.OutcomeNotExecuted, code.Code_INVALID_ARGUMENT, false},
		idempotency.ReasonReplayDenied:    {idempotency.OutcomeUnknown, code.Code_PERMISSION_DENIED, false},
		idempotency.ReasonQuotaExceeded:   {idempotency.OutcomeNotExecuted, code.Code_RESOURCE_EXHAUSTED, true},
		idempotency.ReasonKeyReused:       {idempotency.OutcomeMismatch, code.Code_INVALID_ARGUMENT, false},
		idempotency.ReasonInProgress:      {idempotency.OutcomeInProgress, code.Code_ABORTED, true},
		idempotency.ReasonHandlerFailed:   {idempotency.OutcomeNotExecuted, code.Code_INTERNAL, false},
		idempotency.ReasonTransactionLost: {idempotency.OutcomeUnknown, code.Code_UNKNOWN, false},
		idempotency.ReasonUnavailable:     {idempotency.OutcomeNotExecuted, code.Code_UNAVAILABLE, true},
		idempotency.ReasonOutcomeUnknown:  {idempotency.OutcomeUnknown, code.Code_UNAVAILABLE, true},
		idempotency.ReasonCallUnknown:     {idempotency.OutcomeUnknown, code.Code_UNAVAILABLE, true},
		idempotency.ReasonNeedsAttention:  {idempotency.OutcomeUnknown, code.Code_UNAVAILABLE, true},
		idempotency.ReasonRecordCorrupt:   {idempotency.OutcomeUnknown, code.Code_DATA_LOSS, false},
		rpc.ReasonStreamRefused:           {idempotency.OutcomeNotExecuted, code.Code_UNIMPLEMENTED, false},
	} {
		for _, accepted := range []bool{false, true} {
			want := rpc.Refusal{Reason: reason, Outcome: c.outcome, Accepted: accepted}
			given := want
			given.RetryAfter = 1500 * time.Millisecond
			if c.retry {
				want.RetryAfter = given.RetryAfter
			}
			s := given.Error()
			if got, ok := rpc.Refused(s); !ok || got != want || code.Code(s.GetCode()) != c.code || s.GetMessage() == "" {
				t.Errorf("%s: %v: %+v, want %v and %+v", reason, s, got, c.code, want)
			}
			info, err := s.GetDetails()[0].UnmarshalNew()
			if err != nil {
				t.Fatal(err)
			}
			if name := info.(*errdetails.ErrorInfo).GetReason(); name != strings.ToUpper(name) || strings.Contains(name, "-") {
				t.Errorf("ErrorInfo has the reason %s", name)
			}
		}
	}
	own := &status.Status{Code: int32(code.Code_PERMISSION_DENIED), Message: "blocked", Details: []*anypb.Any{{TypeUrl: "type.googleapis.com/absent.Type"}}}
	s := rpc.Refusal{Reason: idempotency.ReasonScope, Outcome: idempotency.OutcomeNotExecuted, Status: own}.Error()
	if got, ok := rpc.Refused(s); !ok || got.Reason != idempotency.ReasonScope || s.GetCode() != own.GetCode() || s.GetMessage() != "blocked" || len(s.GetDetails()) != 2 {
		t.Errorf("a status of the service's own became %v", s)
	}
	if _, ok := rpc.Refused(own); ok {
		t.Error("an error of the service is taken for a refusal")
	}
}

func TestNoSideEffects(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]bool{
		"/paidonce.rpctest.v1.Probe/Look": true, "/paidonce.rpctest.v1.Probe/Pay": false, "/paidonce.rpctest.v1.Probe/Absent": false,
		"/absent.Service/Look": false, "": false, "/": false, "/paidonce.rpctest.v1.PayRequest": false,
	} {
		if got := rpc.NoSideEffects(name); got != want {
			t.Errorf("%q: %v", name, got)
		}
	}
}

// A key that was used by HTTP is a mismatch, whether a built-in function or the service's own made
// the fingerprint. An unknown version, such as one of a later release, is left undecided.
func TestRecordOfHTTPIsAMismatch(t *testing.T) {
	t.Parallel()
	for version, want := range map[int16]bool{
		idempotency.FingerprintVersionHTTP: true, idempotency.FingerprintVersionUserMin: true, idempotency.FingerprintVersionUserMin + 1: true,
		idempotency.FingerprintVersionRPC: false, 3: false, idempotency.FingerprintVersionUserMin - 1: false,
	} {
		f, known := rpc.FingerprintAt(version)
		if known != want || f.Version != version || f.Equal(idempotency.NewFingerprint(version, nil)) {
			t.Errorf("version %d: %v, known %t, want %t", version, f.Version, known, want)
		}
	}
}
