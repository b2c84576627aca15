// Package schema is the schema from which ent generates its client.
package schema

import (
	"entgo.io/ent"
	"entgo.io/ent/dialect/entsql"
	"entgo.io/ent/schema"
	"entgo.io/ent/schema/field"
)

// Effect is a row of the table effects.
type Effect struct{ ent.Schema }

func (Effect) Fields() []ent.Field { return []ent.Field{field.Int64("id"), field.String("name")} }

func (Effect) Annotations() []schema.Annotation {
	return []schema.Annotation{entsql.Table("effects")}
}
